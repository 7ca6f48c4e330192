//! Makes the built-in initramfs for another VMM, to try it or to look at it.
//!
//! `initramfs OUT [--init FILE] [--modules DIR NAME,...] [--busybox FILE]
//! [--config JSON]`. Without `--init`, this program itself is the `/init`.

use std::error::Error;
use std::fs::File;

use crossvisor_boot::initramfs::{Builder, InitConfig, ModuleTree, init};

fn main() -> Result<(), Box<dyn Error>> {
    if init::is_init() {
        init::main();
    }
    let mut args = std::env::args().skip(1);
    let out = args
        .next()
        .ok_or("initramfs OUT [options]: see the source")?;
    let mut builder = Builder::new();
    let mut init = "/proc/self/exe".to_owned();
    while let Some(option) = args.next() {
        let mut value = || args.next().ok_or(format!("{option} needs a value"));
        match option.as_str() {
            "--init" => init = value()?,
            "--modules" => {
                let tree = ModuleTree::open(value()?, None)?;
                let names = value()?;
                let names: Vec<&str> = names.split(',').collect();
                let added = builder.modules(&tree, &names)?;
                eprintln!("modules of {}: {}", tree.release(), added.join(" "));
            }
            "--busybox" => builder.busybox(value()?)?,
            "--config" => {
                let config: InitConfig = serde_json::from_str(&value()?)?;
                builder.init_config(&config);
            }
            _ => return Err(format!("unknown option {option}").into()),
        }
    }
    builder.add_init(init)?;
    let initrd = builder.build()?;
    initrd.write_to(&mut File::create(out)?)?;
    eprintln!("{} bytes", initrd.len());
    Ok(())
}
