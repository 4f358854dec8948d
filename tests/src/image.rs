//! Root file systems for containers, made of what the machine has.

use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Command;

use crate::requirement;

/// Makes a root file system with nothing but busybox, which needs no libraries. Who asks for it has seen to it that busybox is there.
pub fn busybox_root(root: &Path) {
    for dir in ["bin", "etc", "tmp", "usr"] {
        std::fs::create_dir_all(root.join(dir)).expect("the test's directory takes directories");
    }
    let busybox = requirement::program("busybox", "").expect("busybox is there");
    std::fs::copy(&busybox, root.join("bin/busybox")).expect("the test's directory takes files");
    let listed = Command::new(&busybox).arg("--list").output();
    let listed = listed.expect("busybox says what it can").stdout;
    for applet in String::from_utf8_lossy(&listed).lines() {
        // Its own name is taken.
        let _ = symlink("busybox", root.join("bin").join(applet));
    }
    let write = |name: &str, text: &str| {
        std::fs::write(root.join(name), text).expect("the test's directory takes files");
    };
    write("etc/passwd", "root:x:0:0::/root:/bin/sh");
    write("etc/this-is-the-image", "yes\n");
    let everybodys = std::fs::Permissions::from_mode(0o1777);
    std::fs::set_permissions(root.join("tmp"), everybodys).expect("it is the test's");
}
