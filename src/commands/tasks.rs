//! `merganser tasks`: the classification tasks that are known by name.

use crate::cli::TasksArgs;
use crate::exit::{ExitCode, Failure, Result};
use crate::report::{Align, Table};
use merganser_stages::did_you_mean;
use merganser_stages::images::tasks::{self, SETS, Task};

pub fn tasks(args: &TasksArgs) -> Result<ExitCode> {
    let Some(name) = &args.task else { return all(args.json) };
    let task = tasks::find(name).ok_or_else(|| {
        Failure::user_help(
            format!("there is no task `{name}`"),
            did_you_mean(name, tasks::all().iter().flat_map(Task::names)),
        )
    })?;
    if args.json {
        outln!("{}", serde_json::to_string_pretty(task).map_err(Failure::failed)?);
        return Ok(ExitCode::Done);
    }
    outln!("{} ({})", task.id, task.title);
    if !task.aliases.is_empty() {
        outln!("also called: {}", task.aliases.join(", "));
    }
    if let Some(images) = task.test_images {
        outln!("test images: {images}");
    }
    outln!("{}", task.source);
    if let Some(notes) = &task.notes {
        outln!("{notes}");
    }
    outln!("\ntemplates");
    for template in &task.templates {
        outln!("  {template}");
    }
    outln!("\nclasses");
    for (label, class) in task.classes.iter().enumerate() {
        let names: Vec<&str> =
            std::iter::once(&class.name).chain(&class.synonyms).map(String::as_str).collect();
        outln!("  {label:>3}  {}", names.join(", "));
    }
    Ok(ExitCode::Done)
}

fn all(json: bool) -> Result<ExitCode> {
    if json {
        outln!("{}", serde_json::to_string_pretty(tasks::all()).map_err(Failure::failed)?);
        return Ok(ExitCode::Done);
    }
    let mut table = Table::new(&[
        ("task", Align::Left),
        ("what it is", Align::Left),
        ("classes", Align::Right),
        ("test images", Align::Right),
        ("in the sets of", Align::Left),
    ]);
    for (place, task) in tasks::all().iter().enumerate() {
        let sets: Vec<String> = SETS.iter().filter(|&&size| place < size).map(ToString::to_string).collect();
        table.row([
            task.id.clone(),
            task.title.clone(),
            task.classes.len().to_string(),
            task.test_images.map(|images| images.to_string()).unwrap_or_default(),
            sets.join(", "),
        ]);
    }
    out!("{table}");
    outln!("\n`merganser tasks TASK` shows class names and prompts");
    Ok(ExitCode::Done)
}
