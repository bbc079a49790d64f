//! Scans: from entropy-coded data to the samples of each component.
//!
//! The blocks of a sequential file are transformed as they are read; those of a progressive file are refined by every scan, so they are kept.

use super::header::{Frame, Scan, Tables, ZIGZAG};
use super::huffman::{Bits, Huffman};
use super::{JpegError, MAX_PIXELS, idct};

/// The components of an image while its scans are read.
pub(super) struct Planes {
    progressive: bool,
    height: usize,
    width: usize,
    /// MCUs in a row, and rows of them.
    mcus: (usize, usize),
    components: Vec<Component>,
}

/// One component. Samples and coefficients are kept for whole MCUs, which may reach beyond the image.
pub(super) struct Component {
    id: u8,
    h: usize,
    v: usize,
    table: usize,
    /// Blocks in a row, and rows, of scans of this component alone.
    own_blocks: (usize, usize),
    /// Blocks in a row that are kept.
    blocks_in_row: usize,
    /// Steps by the position in a block, since the component's first scan.
    steps: Option<[i32; 64]>,
    /// `[row][column]`, rows of `8 * blocks_in_row`.
    samples: Vec<u8>,
    /// `[block][position]`; only of progressive files.
    coefficients: Vec<[i16; 64]>,
    /// By coefficient in scan order: the bits that are still missing; none read yet is 255.
    missing_bits: [u8; 64],
}

/// A complete component.
pub(super) struct Plane {
    /// Samples that belong to the image.
    pub height: usize,
    pub width: usize,
    /// How many output pixels a sample stands for, down and across.
    pub factor: (usize, usize),
    pub samples: Vec<u8>,
    pub stride: usize,
}

pub(super) struct Decoded {
    pub height: usize,
    pub width: usize,
    pub planes: Vec<Plane>,
}

impl Planes {
    pub(super) fn new(frame: Frame, bytes: usize) -> Result<Self, JpegError> {
        let Frame { progressive, height, width, components } = frame;
        if height * width > MAX_PIXELS {
            return Err(JpegError::TooLarge { width, height, most: MAX_PIXELS });
        }
        let max_h = components.iter().map(|component| component.h).max().unwrap_or(1);
        let max_v = components.iter().map(|component| component.v).max().unwrap_or(1);
        if components.iter().any(|c| max_h % c.h != 0 || max_v % c.v != 0) {
            return Err(JpegError::Unsupported("fractional subsampling".to_owned()));
        }
        let mcus = (width.div_ceil(8 * max_h), height.div_ceil(8 * max_v));
        let blocks: usize = components.iter().map(|c| mcus.0 * c.h * mcus.1 * c.v).sum();
        if blocks / 8 > bytes {
            return Err(JpegError::Claim { width, height, bytes });
        }
        let component = |c: &super::header::FrameComponent| {
            let blocks_in_row = mcus.0 * c.h;
            let blocks = blocks_in_row * mcus.1 * c.v;
            let (own_width, own_height) = ((width * c.h).div_ceil(max_h), (height * c.v).div_ceil(max_v));
            Component {
                id: c.id,
                h: c.h,
                v: c.v,
                table: c.table,
                own_blocks: (own_width.div_ceil(8), own_height.div_ceil(8)),
                blocks_in_row,
                steps: None,
                samples: vec![0; 64 * blocks],
                coefficients: if progressive { vec![[0; 64]; blocks] } else { Vec::new() },
                missing_bits: [255; 64],
            }
        };
        let components = components.iter().map(component).collect();
        Ok(Self { progressive, height, width, mcus, components })
    }

    /// Tells whether every bit of every coefficient was read.
    fn is_complete(&self) -> bool {
        self.components.iter().all(|component| component.missing_bits == [0; 64])
    }

    /// Reads the scan whose data `bytes` begins with, and returns its length.
    pub(super) fn read_scan(
        &mut self,
        scan: &Scan,
        tables: &Tables,
        bytes: &[u8],
    ) -> Result<usize, JpegError> {
        let coding = Coding::new(self.progressive, scan)?;
        let mut members = Vec::with_capacity(scan.components.len());
        for &(id, dc, ac) in &scan.components {
            let corrupt = JpegError::Corrupt("a scan is of components that the frame does not have");
            let index = self.components.iter().position(|component| component.id == id).ok_or(corrupt)?;
            if members.iter().any(|member: &Member<'_>| member.index == index) {
                return Err(JpegError::Corrupt("a scan has a component twice"));
            }
            let (dc, ac) = (tables.dc[dc].as_ref(), tables.ac[ac].as_ref());
            if (coding.needs_dc() && dc.is_none()) || (coding.needs_ac() && ac.is_none()) {
                return Err(MISSING_TABLE);
            }
            self.components[index].begin(scan, &coding, tables)?;
            members.push(Member { index, dc, ac, prediction: 0 });
        }
        let alone = members.len() == 1;
        let (across, down) = if alone { self.components[members[0].index].own_blocks } else { self.mcus };
        let mut bits = Bits::new(bytes);
        let mut end_of_band = 0;
        for mcu in 0..across * down {
            if tables.restart_interval > 0 && mcu > 0 && mcu % tables.restart_interval == 0 {
                bits.restart(mcu / tables.restart_interval - 1)?;
                end_of_band = 0;
                for member in &mut members {
                    member.prediction = 0;
                }
            }
            let (row, column) = (mcu / across, mcu % across);
            for member in &mut members {
                let component = &mut self.components[member.index];
                let (h, v) = if alone { (1, 1) } else { (component.h, component.v) };
                for block in 0..h * v {
                    let (y, x) = (row * v + block / h, column * h + block % h);
                    component.read_block(&coding, member, &mut end_of_band, &mut bits, y, x)?;
                }
            }
            bits.check()?;
        }
        Ok(bits.position())
    }

    /// Transforms what is left to transform.
    pub(super) fn finish(self) -> Result<Decoded, JpegError> {
        if !self.is_complete() {
            // libjpeg would smooth such an image.
            return Err(JpegError::Unsupported("an image that lacks some of its scans".to_owned()));
        }
        let max_h = self.components.iter().map(|component| component.h).max().unwrap_or(1);
        let max_v = self.components.iter().map(|component| component.v).max().unwrap_or(1);
        let plane = |mut component: Component| {
            let coefficients = std::mem::take(&mut component.coefficients);
            for (index, block) in coefficients.iter().enumerate() {
                let (y, x) = (index / component.blocks_in_row, index % component.blocks_in_row);
                component.transform(block, y, x);
            }
            Plane {
                height: (self.height * component.v).div_ceil(max_v),
                width: (self.width * component.h).div_ceil(max_h),
                factor: (max_v / component.v, max_h / component.h),
                stride: 8 * component.blocks_in_row,
                samples: component.samples,
            }
        };
        let planes = self.components.into_iter().map(plane).collect();
        Ok(Decoded { height: self.height, width: self.width, planes })
    }
}

const MISSING_TABLE: JpegError = JpegError::Corrupt("a scan refers to a Huffman table that is missing");

/// A component of a scan.
struct Member<'a> {
    index: usize,
    dc: Option<&'a Huffman>,
    ac: Option<&'a Huffman>,
    /// The last DC value.
    prediction: i32,
}

/// What a scan brings (T.81, annexes F and G).
enum Coding {
    Sequential,
    DcFirst { low: u8 },
    DcRefine { low: u8 },
    AcFirst { first: usize, last: usize, low: u8 },
    AcRefine { first: usize, last: usize, low: u8 },
}

impl Coding {
    fn new(progressive: bool, scan: &Scan) -> Result<Self, JpegError> {
        let &Scan { first, last, high, low, .. } = scan;
        if !progressive {
            return Ok(Self::Sequential);
        }
        let of_dc = first == 0 && last == 0;
        let of_ac = first > 0 && first <= last && last < 64 && scan.components.len() == 1;
        if !(of_dc || of_ac) || low > 13 || (high > 0 && high != low + 1) {
            return Err(JpegError::Corrupt("a scan of its progression is not valid"));
        }
        Ok(match (of_dc, high) {
            (true, 0) => Self::DcFirst { low },
            (true, _) => Self::DcRefine { low },
            (false, 0) => Self::AcFirst { first, last, low },
            (false, _) => Self::AcRefine { first, last, low },
        })
    }

    fn needs_dc(&self) -> bool {
        matches!(self, Self::Sequential | Self::DcFirst { .. })
    }

    fn needs_ac(&self) -> bool {
        matches!(self, Self::Sequential | Self::AcFirst { .. } | Self::AcRefine { .. })
    }
}

impl Component {
    /// Notes what a scan brings; the component's steps are those in force at its first scan.
    fn begin(&mut self, scan: &Scan, coding: &Coding, tables: &Tables) -> Result<(), JpegError> {
        if self.steps.is_none() {
            let corrupt = JpegError::Corrupt("a component's quantization table is missing");
            let table = tables.quantization[self.table].ok_or(corrupt)?;
            let mut steps = [0; 64];
            for (&place, step) in ZIGZAG.iter().zip(table) {
                steps[usize::from(place)] = i32::from(step);
            }
            self.steps = Some(steps);
        }
        let (range, low) = match coding {
            Coding::Sequential => (0..=63, 0),
            _ => (scan.first..=scan.last, scan.low),
        };
        for missing in &mut self.missing_bits[range] {
            let expected =
                if scan.high == 0 || matches!(coding, Coding::Sequential) { 255 } else { scan.high };
            if *missing != expected {
                return Err(JpegError::Corrupt("its scans bring the same bits twice"));
            }
            *missing = low;
        }
        Ok(())
    }

    fn read_block(
        &mut self,
        coding: &Coding,
        member: &mut Member<'_>,
        end_of_band: &mut u32,
        bits: &mut Bits<'_>,
        y: usize,
        x: usize,
    ) -> Result<(), JpegError> {
        let place = y * self.blocks_in_row + x;
        match (coding, member.dc, member.ac) {
            (Coding::Sequential, Some(dc), Some(ac)) => {
                let mut block = [0; 64];
                sequential(bits, dc, ac, &mut member.prediction, &mut block)?;
                self.transform(&block, y, x);
            }
            (Coding::DcFirst { low }, Some(dc), _) => {
                let n = bits.symbol(dc)?;
                member.prediction = member.prediction.wrapping_add(bits.signed(u32::from(n)));
                self.coefficients[place][0] = (member.prediction << low) as i16;
            }
            (Coding::DcRefine { low }, _, _) => {
                self.coefficients[place][0] |= (bits.take(1) << low) as i16;
            }
            (&Coding::AcFirst { first, last, low }, _, Some(ac)) => {
                let block = &mut self.coefficients[place];
                ac_first(bits, ac, end_of_band, block, first, last, low)?;
            }
            (&Coding::AcRefine { first, last, low }, _, Some(ac)) => {
                let block = &mut self.coefficients[place];
                ac_refine(bits, ac, end_of_band, block, first, last, low)?;
            }
            _ => return Err(MISSING_TABLE),
        }
        Ok(())
    }

    fn transform(&mut self, block: &[i16; 64], y: usize, x: usize) {
        let stride = 8 * self.blocks_in_row;
        let steps = self.steps.as_ref().expect("a block is of a scan, which has them");
        idct::transform(block, steps, &mut self.samples[8 * y * stride + 8 * x..], stride);
    }
}

fn sequential(
    bits: &mut Bits<'_>,
    dc: &Huffman,
    ac: &Huffman,
    prediction: &mut i32,
    block: &mut [i16; 64],
) -> Result<(), JpegError> {
    let n = bits.symbol(dc)?;
    *prediction = prediction.wrapping_add(bits.signed(u32::from(n)));
    block[0] = *prediction as i16;
    let mut k = 1;
    while k < 64 {
        let symbol = bits.symbol(ac)?;
        let (run, n) = (usize::from(symbol >> 4), u32::from(symbol & 15));
        if n == 0 {
            if run < 15 {
                break;
            }
            k += 16;
            continue;
        }
        k += run;
        let place = ZIGZAG.get(k).ok_or(TOO_MANY)?;
        block[usize::from(*place)] = bits.signed(n) as i16;
        k += 1;
    }
    Ok(())
}

const TOO_MANY: JpegError = JpegError::Corrupt("a block has more than 64 coefficients");

fn ac_first(
    bits: &mut Bits<'_>,
    ac: &Huffman,
    end_of_band: &mut u32,
    block: &mut [i16; 64],
    first: usize,
    last: usize,
    low: u8,
) -> Result<(), JpegError> {
    if *end_of_band > 0 {
        *end_of_band -= 1;
        return Ok(());
    }
    let mut k = first;
    while k <= last {
        let symbol = bits.symbol(ac)?;
        let (run, n) = (usize::from(symbol >> 4), u32::from(symbol & 15));
        if n == 0 {
            if run < 15 {
                *end_of_band = (1 << run) - 1 + bits.take(run as u32) as u32;
                break;
            }
            k += 16;
            continue;
        }
        k += run;
        let place = ZIGZAG.get(k).ok_or(TOO_MANY)?;
        block[usize::from(*place)] = (bits.signed(n) << low) as i16;
        k += 1;
    }
    Ok(())
}

fn ac_refine(
    bits: &mut Bits<'_>,
    ac: &Huffman,
    end_of_band: &mut u32,
    block: &mut [i16; 64],
    first: usize,
    last: usize,
    low: u8,
) -> Result<(), JpegError> {
    let bit = 1_i16 << low;
    // A coefficient that is not zero gets its next bit, away from zero.
    let refine = |bits: &mut Bits<'_>, value: &mut i16| {
        if bits.take(1) == 1 && *value & bit == 0 {
            *value = value.wrapping_add(if *value >= 0 { bit } else { -bit });
        }
    };
    let mut k = first;
    if *end_of_band == 0 {
        while k <= last {
            let symbol = bits.symbol(ac)?;
            let (mut run, n) = (symbol >> 4, symbol & 15);
            let mut new = 0;
            if n > 0 {
                new = if bits.take(1) == 1 { bit } else { -bit };
            } else if run < 15 {
                *end_of_band = (1 << run) + bits.take(u32::from(run)) as u32;
                break;
            }
            // Passes over `run` coefficients that stay zero.
            while k <= last {
                let value = &mut block[usize::from(ZIGZAG[k])];
                if *value != 0 {
                    refine(bits, value);
                } else if run == 0 {
                    *value = new;
                    break;
                } else {
                    run -= 1;
                }
                k += 1;
            }
            k += 1;
        }
    }
    if *end_of_band > 0 {
        for &place in &ZIGZAG[k.min(last + 1)..=last] {
            let value = &mut block[usize::from(place)];
            if *value != 0 {
                refine(bits, value);
            }
        }
        *end_of_band -= 1;
    }
    Ok(())
}
