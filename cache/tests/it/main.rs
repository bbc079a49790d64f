//! The store from outside: what survives damage, crashes, races and changes of the user's files.

mod damage;
mod processes;
mod publish;
mod sources;
mod support;
