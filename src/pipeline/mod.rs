//! The pipeline file: from TOML to stages that are known to fit together.
//!
//! [`load()`] reads a file with what it includes and the `--set`s of the command line, and returns either a [`Pipeline`], which is valid
//! by construction, or a [`Failure`](load::Failure) with *every* mistake in it, each at its line and column. Nothing a stage reads is opened,
//! nothing is printed, and the environment is not looked at.
//!
//! The way of a file, a module per step:
//!
//! 1. `lower`: TOML text to a tree of values that remember where they were written;
//! 2. `document`: files included, top-level tables told apart; `overrides`: `--set`;
//! 3. `vars`: `${name}`, with types kept; `sweep`: axes and their combinations;
//! 4. `stage`: each table on its own: substituted, `each`, kind, ports, parameters;
//! 5. `order`: which stage comes first; `resolve`: stages joined into instances and units worked out; `plug`: what fits on a port;
//! 6. `plan`: the result.
//!
//! `source` shows mistakes, `problems` collects them, `text` and `reference` are the small grammars of `--set` and `from`.
//!
//! # Codes
//!
//! Stable: scripts and documentation refer to them.
//!
//! | code | what is wrong |
//! |---|---|
//! | `unreadable-file` | a file cannot be read, is no UTF-8, or is larger than 16 MiB |
//! | `syntax` | the text is no TOML |
//! | `duplicate-key` | a key or a table is given twice |
//! | `bad-number` | an integer beyond 64 bits, an infinity, not-a-number |
//! | `date` | a date, which no parameter is |
//! | `include-cycle` | files include each other, or too deeply |
//! | `unknown-key` | a key that means nothing there |
//! | `wrong-type` | a value of another type than its key has |
//! | `missing-key` | a key that must be there |
//! | `bad-address` | an address (`hf://…`) that cannot be one, or a place to write to that is one |
//! | `bad-value` | a value of the right type that is not possible |
//! | `bad-name` | a name of a stage or variable with characters that it cannot have |
//! | `no-stages` | a pipeline without stages |
//! | `unknown-variable` | `${name}`, `--set name=…` or a sweep over something that is not in `[vars]` |
//! | `variable-cycle` | variables that use each other |
//! | `bad-reference` | `${` that is not closed or names nothing |
//! | `not-text` | an array or a table spliced into text |
//! | `too-large` | a sweep or variables that expand beyond any use |
//! | `bad-override` | a `--set` that is not `name=value` |
//! | `bad-sweep` | an axis without values, with one twice, or that depends on an axis |
//! | `bad-each` | an `each` that is not one name with a list of different members of one sort |
//! | `shadowed-variable` | an `each` that binds the name of a variable |
//! | `each-units` | an `each` of a stage that produces several artifacts by itself |
//! | `unknown-kind` | a `kind` that does not exist |
//! | `unknown-stage` | a stage that does not exist |
//! | `unknown-instance` | `stage[var=value]` where the stage has no such instance |
//! | `unknown-member` | a member that a collection does not have |
//! | `member-mismatch` | collections with different members on ports that are matched by member |
//! | `bad-stage-name` | brackets after a stage's name that make no sense |
//! | `no-ports` | `from` on a kind that takes no inputs |
//! | `ambiguous-from` | `from = "stage"` on a kind with several ports |
//! | `unknown-port` | a port that the kind does not have |
//! | `missing-port` | a port that must be connected |
//! | `wrong-content` | a stage on a port that takes something else |
//! | `self-reference` | a stage that takes its own output |
//! | `cycle` | stages that need each other |
//! | `broken-kind` | a stage kind that does not keep its contract (our mistake, not the user's) |
//! | `unused-variable` | warning: a variable or an axis that nothing uses |
//! | `replaced-override` | warning: two `--set`s of one variable |

mod document;
mod load;
mod lower;
mod order;
mod overrides;
mod plan;
mod plug;
mod problems;
mod reference;
mod resolve;
mod source;
mod stage;
mod sweep;
mod text;
mod vars;

#[cfg(test)]
mod tests;

pub use load::{Failure as LoadFailure, load};
pub use plan::{Instance, Pipeline, ResolvedTake, Selection};
pub use source::{Files, ProblemReport, RenderStyle};
