//! Downloads against servers that behave like the real ones, and against servers that do not.

mod hub;
mod lab;
mod object;
mod web;

#[path = "../support/server.rs"]
mod server;
