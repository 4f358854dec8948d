//! What the kernel unpacks into its memory when it starts: a cpio archive in the "newc" form.

/// Where a number that the kernel does not look at is asked for.
const ZERO: u32 = 0;
const FILE: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const LINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;
const END: &str = "TRAILER!!!";

/// An archive that grows. Directories come before what is in them.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    pub fn directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY | 0o755, (ZERO, ZERO), b"");
    }

    pub fn file(&mut self, path: &str, content: &[u8]) {
        self.entry(path, FILE | 0o644, (ZERO, ZERO), content);
    }

    pub fn program(&mut self, path: &str, content: &[u8]) {
        self.entry(path, FILE | 0o755, (ZERO, ZERO), content);
    }

    pub fn link(&mut self, path: &str, to: &str) {
        self.entry(path, LINK | 0o777, (ZERO, ZERO), to.as_bytes());
    }

    pub fn character_device(&mut self, path: &str, number: (u32, u32)) {
        self.entry(path, CHARACTER_DEVICE | 0o600, number, b"");
    }

    pub fn finish(mut self) -> Vec<u8> {
        self.entry(END, ZERO, (ZERO, ZERO), b"");
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.inode += 1;
        let size = u32::try_from(content.len()).expect("no file is that large");
        let name = u32::try_from(path.len() + 1).expect("no name is that long");
        let links = 1;
        let fields = [
            self.inode, mode, ZERO, ZERO, links, ZERO, size, ZERO, ZERO, device.0, device.1, name,
            ZERO,
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(path.bytes().chain([0]));
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
