//! The few calls of the kernel that no crate makes for us: lasting handles of objects, directories with their cookies, and rights of one
//! thread; and a child that does not outlive the thread that starts it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use nix::libc;
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getpid, getppid};

/// The longest handle of an object that is taken: with what is put around it, it fits the protocol's 64 bytes.
pub const KERNEL_HANDLE_MAX: usize = 43;

/// What the kernel calls an object of a file system, as long as it is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelHandle {
    pub kind: i32,
    pub bytes: Vec<u8>,
}

/// As the kernel reads it.
#[repr(C)]
struct RawHandle {
    bytes: u32,
    kind: i32,
    handle: [u8; KERNEL_HANDLE_MAX],
}

/// The handle of an open object, and the number of the mount it was reached by.
#[allow(unsafe_code)]
pub fn handle_of(file: &OwnedFd) -> io::Result<(KernelHandle, i32)> {
    let mut raw = RawHandle {
        bytes: KERNEL_HANDLE_MAX as u32,
        kind: 0,
        handle: [0; KERNEL_HANDLE_MAX],
    };
    let mut mount = 0;
    // SAFETY: the kernel writes no more into `raw.handle` than `raw.bytes` says, which is its size, and one number into `mount`; the path
    // is a constant that ends in a zero.
    let done = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            file.as_raw_fd(),
            c"".as_ptr(),
            &raw mut raw,
            &raw mut mount,
            libc::AT_EMPTY_PATH,
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    let handle = KernelHandle {
        kind: raw.kind,
        bytes: raw.handle[..raw.bytes as usize].to_vec(),
    };
    Ok((handle, mount))
}

/// Opens the object that a handle names, on the mount that a directory is on. Only who may look at everything may.
#[allow(unsafe_code)]
pub fn open_handle(root: &File, handle: &KernelHandle, flags: i32) -> io::Result<OwnedFd> {
    let mut raw = RawHandle {
        bytes: handle.bytes.len() as u32,
        kind: handle.kind,
        handle: [0; KERNEL_HANDLE_MAX],
    };
    let Some(place) = raw.handle.get_mut(..handle.bytes.len()) else {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    };
    place.copy_from_slice(&handle.bytes);
    // SAFETY: the kernel reads as much of `raw.handle` as `raw.bytes` says, which is in it.
    let opened = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            root.as_raw_fd(),
            &raw mut raw,
            flags | libc::O_CLOEXEC,
        )
    };
    if opened < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it, for nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(opened as i32) })
}

/// Reads the next entries of a directory into a buffer: as many bytes as are returned, none at the end.
#[allow(unsafe_code)]
pub fn entries(directory: &File, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the kernel writes no more into the buffer than its length.
    let read = unsafe {
        libc::syscall(
            libc::SYS_getdents64,
            directory.as_raw_fd(),
            buffer.as_mut_ptr(),
            buffer.len(),
        )
    };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

/// Makes these the further groups of this thread alone: libc's own call is for all threads.
#[allow(unsafe_code)]
pub fn set_thread_groups(groups: &[u32]) -> io::Result<()> {
    // SAFETY: the kernel reads as many groups as there are.
    let done = unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The rights that the server needs, by their numbers: to open by handle, to do what owners may, and to take the place of callers. Above
/// all it may not have the right to go beyond quotas and into what is kept for root, which callers would have with it.
const RIGHTS: [(u32, &str); 4] = [
    (1, "CAP_DAC_OVERRIDE"),
    (2, "CAP_DAC_READ_SEARCH"),
    (6, "CAP_SETGID"),
    (7, "CAP_SETUID"),
];
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

/// Those of the rights that the server needs that this thread does not have, by their names.
#[allow(unsafe_code)]
pub fn missing_rights() -> io::Result<Vec<&'static str>> {
    let mut header = [CAPABILITY_VERSION_3, 0];
    let mut sets = [0_u32; 6];
    // SAFETY: the kernel reads and may write two numbers, and writes, in this version, six.
    let done = unsafe { libc::syscall(libc::SYS_capget, header.as_mut_ptr(), sets.as_mut_ptr()) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    let permitted = sets[1];
    let missing = RIGHTS.iter().filter(|(bit, _)| permitted & (1 << bit) == 0);
    Ok(missing.map(|(_, name)| *name).collect())
}

/// Gives up all rights of root but those that the server needs. Threads that are started later have no more either.
#[allow(unsafe_code)]
pub fn give_up_rights() -> io::Result<()> {
    let header = [CAPABILITY_VERSION_3, 0];
    let rights = RIGHTS.iter().fold(0, |all, (bit, _)| all | (1 << bit));
    // Effective, permitted and inherited, for the first 32 rights and for the others.
    let sets = [rights, rights, 0, 0, 0, 0];
    // SAFETY: the kernel reads two numbers and, in this version, six.
    let done = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Has what a command starts end when the thread ends that starts it, however that ends.
#[allow(unsafe_code)]
pub fn end_together(command: &mut Command) {
    let parent: Pid = getpid();
    let bind = move || {
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        match getppid() == parent {
            true => Ok(()),
            // It has ended just now.
            false => Err(io::Error::from_raw_os_error(libc::ESRCH)),
        }
    };
    // SAFETY: what runs in the new process before it becomes the program makes two calls of the kernel, and takes no memory or lock.
    unsafe { command.pre_exec(bind) };
}
