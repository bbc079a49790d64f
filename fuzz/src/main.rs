//! A mutation loop that any stable compiler builds: `mutate TARGET AMOUNT [SEED]`, an amount being `10000000` executions or `300s`.
//!
//! It has no coverage feedback, only seeds that reach deep and mutations that know the formats. Everything follows from the seed, so
//! that a finding is repeated by the same command. Memory is counted: an execution that takes more than the limit beyond
//! eight times its input is a finding. `mutate corpus FOLDER` writes the seeds for cargo-fuzz.

use std::alloc::{GlobalAlloc, Layout, System};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use merganser_fuzz::{Target, seeds};

/// Bytes that an execution may take beyond eight times its input.
const MEMORY_LIMIT: usize = 100_000_000;

/// An execution that takes longer is reported as a hang.
const TIME_LIMIT: Duration = Duration::from_secs(5);

/// An execution that takes longer is repeated before it is believed.
const SLOW: Duration = Duration::from_millis(50);

/// Longest input that mutations make.
const MAX_INPUT: usize = 32 << 10;

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is passed on to the system's allocator; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the obligations are those of this function.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the obligations are those of this function.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Xorshift: the same numbers everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, n: usize) -> usize {
        if n == 0 { 0 } else { (self.next() >> 16) as usize % n }
    }
}

/// Bytes that mean something to one of the formats.
const TOKENS: &[&[u8]] = &[
    b"(",
    b".",
    b"0",
    b"1",
    b"2",
    b"R",
    b"b",
    b"\x81",
    b"\x93",
    b"\x94",
    b"}",
    b"]",
    b")",
    b"u",
    b"s",
    b"e",
    b"a",
    b"t",
    b"\x85",
    b"\x86",
    b"\x87",
    b"Q",
    b"N",
    b"h\x00",
    b"h\x01",
    b"q\x00",
    b"K\x00",
    b"J\xff\xff\xff\xff",
    b"\x8a\x08\0\0\0\0\0\0\0\x10",
    b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"X\xff\xff\xff\x7f",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch.storage\n_load_from_bytes\n",
    b"ccollections\nOrderedDict\n",
    b"cnumpy\ndtype\n",
    b"X\x0b\0\0\0_parameters",
    b"X\x08\0\0\0_modules",
    b"X\x08\0\0\0_buffers",
    b"X\x0a\0\0\0state_dict",
    b"PK\x03\x04",
    b"PK\x01\x02",
    b"PK\x05\x06",
    b"PK\x06\x06",
    b"PK\x06\x07",
    b"../",
    b"\x93NUMPY\x01\0",
    b"'fortran_order': True",
    b"'descr': '>f8'",
    b"(9223372036854775807,)",
    b"18446744073709551615",
    b"\"shape\":[",
    b"\"dtype\":\"F8_E4M3\"",
    b"\"data_offsets\":[0,",
    b"__metadata__",
    b"\"r\":0",
    b"\"rank_pattern\":{\"(a*)*\":2}",
    b".lora_A.weight",
    b".lora_embedding_B",
    b"\"artifact\":",
    b"\"layout\":{\"linear\":",
    b"\"strides\":[",
    b"1e999",
    b"vision_model.encoder.layers.0.",
    b"model.visual.transformer.resblocks.",
    b"\\ud800",
    b"null",
    b"{",
    b"[",
    b"\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\0\0\0\0\0\0\0\x80",
];

fn mutate(random: &mut Random, seeds: &[Vec<u8>], input: &mut Vec<u8>) {
    input.clear();
    input.extend_from_slice(&seeds[random.below(seeds.len())]);
    for _ in 0..=random.below(6) {
        let at = random.below(input.len());
        match random.below(9) {
            0 | 1 if !input.is_empty() => input[at] = random.next() as u8,
            2 if !input.is_empty() => input[at] ^= 1 << random.below(8),
            3 if !input.is_empty() => input[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
            4 => {
                let end = (at + 1 + random.below(32)).min(input.len());
                input.drain(at..end);
            }
            5 => {
                let token = TOKENS[random.below(TOKENS.len())];
                input.splice(at..at, token.iter().copied());
            }
            6 => {
                let token = TOKENS[random.below(TOKENS.len())];
                let end = (at + token.len()).min(input.len());
                input[at..end].copy_from_slice(&token[..end - at]);
            }
            7 => {
                let other = &seeds[random.below(seeds.len())];
                let from = random.below(other.len());
                let piece = &other[from..(from + random.below(256)).min(other.len())];
                input.splice(at..at, piece.iter().copied());
            }
            _ => {
                let end = (at + random.below(64)).min(input.len());
                let piece = input[at..end].to_vec();
                let to = random.below(input.len() + 1);
                input.splice(to..to, piece);
            }
        }
    }
    if random.below(16) == 0 {
        let length = random.below(input.len() + 1);
        input.truncate(length);
    }
    input.truncate(MAX_INPUT);
}

/// Returns whether the promises were kept, how long that took, and the most memory.
fn execute(target: Target, input: &[u8]) -> (std::thread::Result<()>, Duration, usize) {
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let start = Instant::now();
    let result = std::panic::catch_unwind(|| target.run(input));
    (result, start.elapsed(), PEAK.load(Ordering::Relaxed) - before)
}

/// When to stop.
#[derive(Clone, Copy)]
enum Amount {
    Executions(u64),
    Time(Duration),
}

impl Amount {
    fn parse(text: &str) -> Option<Self> {
        match text.strip_suffix('s') {
            Some(seconds) => Some(Self::Time(Duration::from_secs(seconds.parse().ok()?))),
            None => Some(Self::Executions(text.parse().ok()?)),
        }
    }

    fn is_done(self, executions: u64, start: Instant) -> bool {
        match self {
            Self::Executions(amount) => executions >= amount,
            // the clock is not looked at every time
            Self::Time(amount) => executions.is_multiple_of(256) && start.elapsed() >= amount,
        }
    }
}

fn fuzz(target: Target, seeds: &[Vec<u8>], amount: Amount, seed: u64) -> ExitCode {
    let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let (mut input, mut executions, mut worst, mut slowest) = (Vec::new(), 0u64, 0, Duration::ZERO);
    let start = Instant::now();
    while !amount.is_done(executions, start) {
        mutate(&mut random, seeds, &mut input);
        let (result, mut took, memory) = execute(target, &input);
        executions += 1;
        if took > SLOW {
            // on a busy machine, most of that was spent waiting
            took = took.min(execute(target, &input).1).min(execute(target, &input).1);
        }
        (worst, slowest) = (worst.max(memory), slowest.max(took));
        if result.is_err() || took > TIME_LIMIT || memory > MEMORY_LIMIT + 8 * input.len() {
            let path = std::env::temp_dir().join(format!("merganser-fuzz-{}-{executions}", target.name()));
            let written = std::fs::write(&path, &input);
            eprintln!(
                "execution {executions} of seed {seed}: {took:?}, {memory} bytes; input in {} ({written:?})",
                path.display()
            );
            return ExitCode::FAILURE;
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{}: {executions} executions in {seconds:.0} s ({:.0}/s), most memory {worst} bytes, slowest {slowest:?}, seed {seed}",
        target.name(),
        executions as f64 / seconds
    );
    ExitCode::SUCCESS
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let seeds = match seeds() {
        Ok(seeds) => seeds,
        Err(error) => {
            eprintln!("cannot read the seeds: {error}");
            return ExitCode::FAILURE;
        }
    };
    if let ["corpus", folder] = arguments[..] {
        let write = || -> std::io::Result<()> {
            for (target, seeds) in &seeds {
                let folder = std::path::Path::new(folder).join(target);
                std::fs::create_dir_all(&folder)?;
                for (i, seed) in seeds.iter().enumerate() {
                    std::fs::write(folder.join(format!("seed-{i:02}")), seed)?;
                }
            }
            Ok(())
        };
        return write().map_or_else(
            |error| {
                eprintln!("cannot write the seeds: {error}");
                ExitCode::FAILURE
            },
            |()| ExitCode::SUCCESS,
        );
    }
    let parsed = match arguments[..] {
        [target, amount] => Some((target, amount, "1")),
        [target, amount, seed] => Some((target, amount, seed)),
        _ => None,
    };
    let parsed = parsed.and_then(|(target, amount, seed)| {
        let target = Target::ALL.into_iter().find(|known| known.name() == target)?;
        Some((target, Amount::parse(amount)?, seed.parse().ok()?))
    });
    let Some((target, amount, seed)) = parsed else {
        let names = Target::ALL.map(Target::name).join("|");
        eprintln!("usage: mutate {names} EXECUTIONS|SECONDSs [SEED]\n       mutate corpus FOLDER");
        return ExitCode::FAILURE;
    };
    std::panic::set_hook(Box::new(|info| eprintln!("{info}")));
    fuzz(target, &seeds[target.name()], amount, seed)
}
