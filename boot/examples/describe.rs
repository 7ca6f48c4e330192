//! Says what kernel images are: `describe FILE...`.

use crossvisor_boot::KernelImage;

fn main() {
    for path in std::env::args().skip(1) {
        match KernelImage::open(&path) {
            Ok(image) => {
                println!("{image}");
                println!(
                    "    {} bytes, {:#x} in memory",
                    image.size(),
                    image.footprint()
                );
            }
            Err(e) => println!("{e}"),
        }
    }
}
