//! Procedures that change names and attributes. What they answer is on the disk before.

use std::os::fd::AsFd as _;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag};
use nix::libc;
use nix::sys::stat::{
    FchmodatFlags, Mode, SFlag, UtimensatFlags, fchmodat, mkdirat, mknodat, utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags};

use super::calls::{Call, Done, Fault};
use super::export::{self, Object};
use super::protocol::{self, Change, HANDLE_MAX, PATH_MAX, Place, SetTime, Settings, Status, Time};
use super::xdr::{Reader, Writer};

/// How often a name may come and go while it is opened or made.
const CREATE_TRIES: usize = 16;

/// How a file is to be made.
enum How {
    /// It may be there.
    Unchecked(Settings),
    /// It may not.
    Guarded(Settings),
    /// It may be there if it was made with these numbers: then this is the same call once more. They are kept as its times.
    Exclusive([u8; 8]),
}

impl Call<'_> {
    pub fn setattr(&self, args: &mut Reader, out: &mut Writer) -> Done {
        let (handle, settings, guard) = args.all(|args| {
            Ok((
                args.bytes(HANDLE_MAX)?,
                protocol::settings(args)?,
                args.option(protocol::read_time)?,
            ))
        })?;
        let object = self.export.object(handle)?;
        let held = self.export.lock(&object);
        let before = self.export.now(&object);
        let differs = |guard: Time| before.is_none_or(|before| before.changed != guard);
        if guard.is_some_and(differs) {
            return Err(Status::NotSync.into());
        }
        let mut changed = false;
        let set = self.set(&object, &settings, &mut changed);
        let after = self.export.now(&object);
        drop(held);
        // Also what was done before something failed.
        if changed {
            object.sync(self.export)?;
        }
        set?;
        Change { before, after }.write(out);
        Ok(())
    }

    /// Sets attributes with the caller's rights, one after the other; says whether one was, also where the next one is refused.
    fn set(&self, object: &Object, settings: &Settings, changed: &mut bool) -> Result<(), Status> {
        if *settings == Settings::default() {
            return Ok(());
        }
        if let Some(size) = settings.size {
            let size = i64::try_from(size).map_err(|_| Status::Fbig)?;
            let file = object.data(self.who, true)?;
            self.who.act(|| nix::unistd::ftruncate(&file, size))??;
            *changed = true;
        }
        self.who.act(|| {
            if settings.uid.is_some() || settings.gid.is_some() {
                let (uid, gid) = (
                    settings.uid.map(Uid::from_raw),
                    settings.gid.map(Gid::from_raw),
                );
                nix::unistd::fchownat(&object.fd, c"", uid, gid, AtFlags::AT_EMPTY_PATH)?;
                *changed = true;
            }
            if let Some(mode) = settings.mode {
                let mode = Mode::from_bits_truncate(mode & 0o7777);
                fchmodat(AT_FDCWD, &object.path(), mode, FchmodatFlags::FollowSymlink)?;
                *changed = true;
            }
            let leave = SetTime::Leave;
            if (settings.accessed, settings.modified) != (leave, leave) {
                let (accessed, modified) = (spec(settings.accessed), spec(settings.modified));
                let follow = UtimensatFlags::FollowSymlink;
                utimensat(AT_FDCWD, &object.path(), &accessed, &modified, follow)?;
                *changed = true;
            }
            Ok::<_, Errno>(())
        })??;
        Ok(())
    }

    /// Gives an object that was just made what it was not made with. Its mode is as asked; whose it is the kernel has decided, where it
    /// is to be the caller's. Returns whether something was changed.
    fn finish(&self, object: &Object, settings: &Settings) -> Result<bool, Status> {
        let rest = Settings {
            mode: None,
            uid: settings.uid.filter(|uid| !self.who.is_user(*uid)),
            gid: settings.gid.filter(|gid| !self.who.is_group(*gid)),
            ..*settings
        };
        let mut changed = false;
        self.set(object, &rest, &mut changed)?;
        Ok(changed)
    }

    /// Changes a directory, tells what became of it, and has it last.
    fn within<T>(
        &self,
        directory: &Object,
        work: impl FnOnce() -> Result<T, Status>,
    ) -> Result<(T, Change), Status> {
        let held = self.export.lock(directory);
        let before = self.export.now(directory);
        let made = work()?;
        let after = self.export.now(directory);
        drop(held);
        directory.sync(self.export)?;
        Ok((made, Change { before, after }))
    }

    fn tell(&self, made: &Object, change: &Change, out: &mut Writer) -> Done {
        out.bool(true).bytes(&self.export.handle(&made.fd)?);
        protocol::maybe(out, self.export.now(made).as_ref());
        change.write(out);
        Ok(())
    }

    pub fn create(&self, args: &mut Reader, out: &mut Writer) -> Done {
        let (place, how) = args.all(|args| {
            let place = protocol::place(args)?;
            let how = match args.u32()? {
                0 => How::Unchecked(protocol::settings(args)?),
                1 => How::Guarded(protocol::settings(args)?),
                2 => How::Exclusive(args.array()?),
                _ => return Err(super::xdr::Garbage),
            };
            Ok((place, how))
        })?;
        let directory = self.export.directory(place.directory)?;
        let name = export::name(place.name)?;
        let (made, change) = self.within(&directory, || self.made(&directory, name, &how))?;
        made.sync(self.export)?;
        self.tell(&made, &change, out)
    }

    fn made(&self, directory: &Object, name: &[u8], how: &How) -> Result<Object, Status> {
        let settings = match how {
            How::Unchecked(settings) | How::Guarded(settings) => *settings,
            How::Exclusive(numbers) => marked(numbers),
        };
        let mode = Mode::from_bits_truncate(settings.mode.unwrap_or(0o600) & 0o7777);
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_NONBLOCK;
        for _ in 0..CREATE_TRIES {
            let made = self.who.act(|| directory.child(name, flags, mode))?;
            match made {
                Ok(fd) => {
                    let object = self.export.own(fd)?;
                    self.finish(&object, &settings)?;
                    return Ok(object);
                }
                Err(Errno::EEXIST) => {}
                Err(error) => return Err(error.into()),
            }
            match self.found(directory, name) {
                Ok(object) => return self.there(object, how),
                Err(Status::NoEnt) => {}
                Err(status) => return Err(status),
            }
        }
        Err(Status::Jukebox)
    }

    /// What becomes of a call to make something that is there.
    fn there(&self, object: Object, how: &How) -> Result<Object, Status> {
        let file = object.kind() == SFlag::S_IFREG;
        match how {
            How::Unchecked(settings) if file => {
                let size = Settings {
                    size: settings.size,
                    ..Settings::default()
                };
                self.set(&object, &size, &mut false)?;
                Ok(object)
            }
            How::Exclusive(numbers) if file => {
                let now = self.export.attributes(&object.stat);
                let marks = marked(numbers);
                let kept = (SetTime::To(now.accessed), SetTime::To(now.modified));
                match kept == (marks.accessed, marks.modified) && now.size == 0 {
                    true => Ok(object),
                    false => Err(Status::Exist),
                }
            }
            _ => Err(Status::Exist),
        }
    }

    pub fn mkdir(&self, args: &mut Reader, out: &mut Writer) -> Done {
        let (place, settings) =
            args.all(|args| Ok((protocol::place(args)?, protocol::settings(args)?)))?;
        let directory = self.export.directory(place.directory)?;
        let name = export::name(place.name)?;
        without_size(&settings)?;
        let (made, change) = self.within(&directory, || {
            let mode = Mode::from_bits_truncate(settings.mode.unwrap_or(0o755) & 0o7777);
            self.who.act(|| mkdirat(&directory.fd, name, mode))??;
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
            let made = self
                .export
                .own(directory.child(name, flags, Mode::empty())?)?;
            self.finish(&made, &settings)?;
            Ok(made)
        })?;
        made.sync(self.export)?;
        self.tell(&made, &change, out)
    }

    pub fn symlink(&self, args: &mut Reader, out: &mut Writer) -> Done {
        let (place, settings, target) = args.all(|args| {
            let (place, settings) = (protocol::place(args)?, protocol::settings(args)?);
            Ok((place, settings, args.bytes(PATH_MAX)?))
        })?;
        // Links have no mode: what some clients ask for is what all links are said to have.
        let make = |directory: &Object, name: &[u8]| {
            nix::unistd::symlinkat(target, directory.fd.as_fd(), name)
        };
        let (made, change) = self.special(place, &settings, make)?;
        self.tell(&made, &change, out)
    }

    /// Pipes and sockets. Devices would be as good on the host as on the client.
    pub fn mknod(&self, args: &mut Reader, out: &mut Writer) -> Done {
        let (place, kind, settings) = args.all(|args| {
            let (place, kind) = (protocol::place(args)?, args.u32()?);
            let settings = match kind {
                3 | 4 => {
                    let settings = protocol::settings(args)?;
                    // The numbers of the device.
                    args.u64()?;
                    settings
                }
                6 | 7 => protocol::settings(args)?,
                _ => Settings::default(),
            };
            Ok((place, kind, settings))
        })?;
        let kind = match kind {
            3 | 4 => return Err(Status::NotSupp.into()),
            6 => SFlag::S_IFSOCK,
            7 => SFlag::S_IFIFO,
            _ => return Err(Status::BadType.into()),
        };
        let mode = Mode::from_bits_truncate(settings.mode.unwrap_or(0o600) & 0o7777);
        let make = |directory: &Object, name: &[u8]| mknodat(&directory.fd, name, kind, mode, 0);
        let (made, change) = self.special(place, &settings, make)?;
        self.tell(&made, &change, out)
    }

    /// Makes something that is no file and no directory.
    fn special(
        &self,
        place: Place,
        settings: &Settings,
        make: impl FnOnce(&Object, &[u8]) -> Result<(), Errno>,
    ) -> Result<(Object, Change), Fault> {
        let directory = self.export.directory(place.directory)?;
        let name = export::name(place.name)?;
        without_size(settings)?;
        let ((made, changed), change) = self.within(&directory, || {
            self.who.act(|| make(&directory, name))??;
            let made = self.found(&directory, name)?;
            let changed = self.finish(&made, settings)?;
            Ok((made, changed))
        })?;
        // That it is there, its directory has made last.
        if changed {
            made.sync(self.export)?;
        }
        Ok((made, change))
    }

    pub fn remove(&self, args: &mut Reader, out: &mut Writer, whole: bool) -> Done {
        let place = args.all(protocol::place)?;
        let directory = self.export.directory(place.directory)?;
        let name = export::name(place.name)?;
        let flag = if whole {
            UnlinkatFlags::RemoveDir
        } else {
            UnlinkatFlags::NoRemoveDir
        };
        let removed = self.within(&directory, || {
            let remove = || nix::unistd::unlinkat(&directory.fd, name, flag);
            Ok(self.who.act(remove)??)
        });
        removed?.1.write(out);
        Ok(())
    }

    pub fn rename(&self, args: &mut Reader, out: &mut Writer) -> Done {
        let (from, to) = args.all(|args| Ok((protocol::place(args)?, protocol::place(args)?)))?;
        let one = self.export.directory(from.directory)?;
        let other = self.export.directory(to.directory)?;
        let (old, new) = (export::name(from.name)?, export::name(to.name)?);
        let held = self.export.lock_both(&one, &other);
        let before = (self.export.now(&one), self.export.now(&other));
        let rename = || nix::fcntl::renameat(&one.fd, old, &other.fd, new);
        self.who.act(rename)??;
        let after = (self.export.now(&one), self.export.now(&other));
        drop(held);
        other.sync(self.export)?;
        if one.stat.st_ino != other.stat.st_ino {
            one.sync(self.export)?;
        }
        let change = |before, after| Change { before, after };
        change(before.0, after.0).write(out);
        change(before.1, after.1).write(out);
        Ok(())
    }

    pub fn link(&self, args: &mut Reader, out: &mut Writer) -> Done {
        let (handle, place) =
            args.all(|args| Ok((args.bytes(HANDLE_MAX)?, protocol::place(args)?)))?;
        let object = self.export.object(handle)?;
        let directory = self.export.directory(place.directory)?;
        let name = export::name(place.name)?;
        if object.kind() == SFlag::S_IFDIR {
            return Err(Fault::Status(Status::IsDir));
        }
        let ((), change) = self.within(&directory, || {
            let follow = AtFlags::AT_SYMLINK_FOLLOW;
            let (from, to) = (object.path(), directory.fd.as_fd());
            let link = || nix::unistd::linkat(AT_FDCWD, &from, to, name, follow);
            Ok(self.who.act(link)??)
        })?;
        protocol::maybe(out, self.export.now(&object).as_ref());
        change.write(out);
        Ok(())
    }
}

/// That no size is asked for where there is none.
fn without_size(settings: &Settings) -> Result<(), Status> {
    match settings.size {
        None => Ok(()),
        Some(_) => Err(Status::Inval),
    }
}

/// Settings by which a file is known again.
fn marked(numbers: &[u8; 8]) -> Settings {
    let half = |at: usize| {
        let mut seconds = [0; 4];
        seconds.copy_from_slice(&numbers[at..at + 4]);
        // No file system refuses a time before 2038.
        let seconds = u32::from_be_bytes(seconds) & i32::MAX as u32;
        SetTime::To(Time {
            seconds,
            nanoseconds: 0,
        })
    };
    Settings {
        accessed: half(0),
        modified: half(4),
        ..Settings::default()
    }
}

fn spec(time: SetTime) -> TimeSpec {
    match time {
        SetTime::Leave => TimeSpec::new(0, libc::UTIME_OMIT),
        SetTime::Now => TimeSpec::new(0, libc::UTIME_NOW),
        SetTime::To(time) => Duration::new(time.seconds.into(), time.nanoseconds).into(),
    }
}
