//! Components to grey or RGB, in libjpeg's fixed point; four components as Pillow converts them.

use super::header::ColorHints;
use super::scan::Decoded;
use super::upsample;
use crate::images::dataset::Image;

/// What the components stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Colors {
    Grey,
    Rgb,
    YCbCr,
    Cmyk,
    Ycck,
}

/// Interleaves the components of an image and converts them.
pub(super) fn to_image(decoded: &Decoded, hints: ColorHints<'_>) -> Image {
    let (height, width) = (decoded.height, decoded.width);
    let colors = colors(decoded.planes.len(), hints);
    let channels = if colors == Colors::Grey { 1 } else { 3 };
    let mut pixels = vec![0; height * width * channels];
    let mut rows = vec![Vec::new(); decoded.planes.len()];
    let mut sums = Vec::new();
    for (y, out) in pixels.chunks_exact_mut(width * channels).enumerate() {
        for (plane, row) in decoded.planes.iter().zip(&mut rows) {
            upsample::row(plane, y, width, row, &mut sums);
        }
        match &rows[..] {
            [grey] => out.copy_from_slice(&grey[..width]),
            [a, b, c] => {
                for (((pixel, &a), &b), &c) in out.as_chunks_mut::<3>().0.iter_mut().zip(a).zip(b).zip(c) {
                    *pixel = if colors == Colors::YCbCr { rgb(a, b, c) } else { [a, b, c] };
                }
            }
            [a, b, c, d] => {
                let pixels = out.as_chunks_mut::<3>().0.iter_mut().zip(a).zip(b).zip(c).zip(d);
                for ((((pixel, &a), &b), &c), &k) in pixels {
                    // YCCK stands for CMY in the same way as YCbCr for RGB, inverted.
                    let inks = if colors == Colors::Ycck { rgb(a, b, c).map(|v| 255 - v) } else { [a, b, c] };
                    *pixel = of_inks(inks, k);
                }
            }
            _ => unreachable!("a frame has 1, 3 or 4 components"),
        }
    }
    Image::new(height, width, channels, pixels)
}

/// libjpeg's rules: JFIF files hold YCbCr; Adobe's marker says what a file holds; else component ids may spell RGB.
fn colors(components: usize, hints: ColorHints<'_>) -> Colors {
    match (components, hints.adobe) {
        (1, _) => Colors::Grey,
        (3, _) if hints.jfif => Colors::YCbCr,
        (3, Some(0)) => Colors::Rgb,
        (3, None) if hints.ids == b"RGB" => Colors::Rgb,
        (3, _) => Colors::YCbCr,
        (_, None | Some(0)) => Colors::Cmyk,
        _ => Colors::Ycck,
    }
}

/// ITU-R BT.601 as JFIF uses it, with 16 bits after the point:
/// R = Y + 1.402 Cr, G = Y − 0.34414 Cb − 0.71414 Cr, B = Y + 1.772 Cb, where Cb and Cr count from 128.
fn rgb(y: u8, cb: u8, cr: u8) -> [u8; 3] {
    const HALF: i32 = 1 << 15;
    const fn fixed(value: f64) -> i32 {
        (value * 65536.0 + 0.5) as i32
    }
    let (y, cb, cr) = (i32::from(y), i32::from(cb) - 128, i32::from(cr) - 128);
    let red = y + ((fixed(1.402) * cr + HALF) >> 16);
    let green = y + ((-fixed(0.344_14) * cb - fixed(0.714_14) * cr + HALF) >> 16);
    let blue = y + ((fixed(1.772) * cb + HALF) >> 16);
    [red, green, blue].map(|value| value.clamp(0, 255) as u8)
}

/// Pillow's `CMYK;I` and its conversion to RGB: inks are stored inverted, whatever the file says, and what is left of black, 255 − K, is taken
/// away by each ink in proportion.
fn of_inks(inks: [u8; 3], k: u8) -> [u8; 3] {
    // Inverted, black is 255 − k, so what is left of it is k.
    let left = i32::from(k);
    inks.map(|ink| {
        let product = (255 - i32::from(ink)) * left + 128;
        (left - (((product >> 8) + product) >> 8)).clamp(0, 255) as u8
    })
}
