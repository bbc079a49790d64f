//! The classification tasks that model merging is measured on: their class names, in label order, and CLIP's prompts for them.
//!
//! A task is one file of `data/` and one line in `FILES`. Class names and templates decide a zero-shot head, their order decides the labels:
//! both are facts of a dataset and its literature, and each file says where they come from. [`Task::order`] compares them with what a copy of
//! the dataset calls its classes, because redistributions sort them differently.

use std::collections::HashMap;
use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

/// Every task, in the order of the literature: the first 8, 14 and 20 are its benchmarks ([`set`]).
const FILES: &[&str] = &[
    include_str!("data/sun397.json"),
    include_str!("data/cars.json"),
    include_str!("data/resisc45.json"),
    include_str!("data/eurosat.json"),
    include_str!("data/svhn.json"),
    include_str!("data/gtsrb.json"),
    include_str!("data/mnist.json"),
    include_str!("data/dtd.json"),
    include_str!("data/cifar100.json"),
    include_str!("data/stl10.json"),
    include_str!("data/flowers102.json"),
    include_str!("data/pets.json"),
    include_str!("data/pcam.json"),
    include_str!("data/fer2013.json"),
    include_str!("data/emnist.json"),
    include_str!("data/cifar10.json"),
    include_str!("data/food101.json"),
    include_str!("data/fashion.json"),
    include_str!("data/sst2.json"),
    include_str!("data/kmnist.json"),
    include_str!("data/emnist-letters.json"),
];

/// Sizes of the benchmarks, each a prefix of [`all`].
pub const SETS: [usize; 3] = [8, 14, 20];

static TASKS: LazyLock<Vec<Task>> = LazyLock::new(|| {
    FILES.iter().map(|file| serde_json::from_str(file).expect("the files are part of the program")).collect()
});

/// A classification task.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Task {
    /// Its name in lower case.
    pub id: String,
    /// Its full name.
    pub title: String,
    /// Other names that it is found by, in lower case.
    pub aliases: Vec<String>,
    /// Images of the usual test split, if there is one.
    pub test_images: Option<u64>,
    /// Where class names and templates come from.
    pub source: String,
    /// What somebody who compares scores has to know.
    #[serde(default)]
    pub notes: Option<String>,
    /// Label i is entry i.
    pub classes: Vec<Class>,
    /// Prompts of CLIP's text encoder; `{}` stands for the class.
    pub templates: Vec<String>,
}

/// One class of a task.
#[derive(Debug, Deserialize, Serialize)]
#[serde(from = "ClassEntry")]
pub struct Class {
    pub name: String,
    /// Further names that prompts are made of; a zero-shot head averages over all of them.
    pub synonyms: Vec<String>,
    /// What copies of the dataset call the class, such as its folder. No prompts.
    pub also: Vec<String>,
}

/// A class as files write it: a name, or a table.
#[derive(Deserialize)]
#[serde(untagged)]
enum ClassEntry {
    Name(String),
    #[serde(rename_all = "snake_case")]
    Table {
        name: String,
        #[serde(default)]
        synonyms: Vec<String>,
        #[serde(default)]
        also: Vec<String>,
    },
}

impl From<ClassEntry> for Class {
    fn from(entry: ClassEntry) -> Self {
        match entry {
            ClassEntry::Name(name) => Self { name, synonyms: Vec::new(), also: Vec::new() },
            ClassEntry::Table { name, synonyms, also } => Self { name, synonyms, also },
        }
    }
}

/// Why a dataset's classes are not those of a task.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TaskError {
    #[error("task `{task}` has {expected} classes, the dataset {actual}")]
    Count { task: String, expected: usize, actual: usize },
    #[error("task `{task}` has no class `{class}` (label {label} of the dataset)")]
    UnknownClass { task: String, label: usize, class: String },
    #[error("labels {first} and {second} of the dataset are both class `{class}` of task `{task}`")]
    Twice { task: String, first: usize, second: usize, class: String },
}

/// Returns every task.
pub fn all() -> &'static [Task] {
    &TASKS
}

/// Finds a task by its name or an alias; case, spaces, hyphens and underscores do not count.
pub fn find(name: &str) -> Option<&'static Task> {
    let wanted = folded(name);
    TASKS.iter().find(|task| task.names().any(|known| folded(known) == wanted))
}

/// Returns the tasks of the benchmark of 8, 14 or 20; `None` for other numbers.
pub fn set(size: usize) -> Option<&'static [Task]> {
    SETS.contains(&size).then(|| &TASKS[..size])
}

impl Task {
    /// Its id and its aliases.
    pub fn names(&self) -> impl Iterator<Item = &str> + Clone {
        std::iter::once(&self.id).chain(&self.aliases).map(String::as_str)
    }

    /// Returns the class names in label order.
    pub fn class_names(&self) -> Vec<String> {
        self.classes.iter().map(|class| class.name.clone()).collect()
    }

    /// Returns the prompts of a class: its names, each in every template.
    ///
    /// # Panics
    /// If there is no such class.
    pub fn prompts(&self, class: usize) -> Vec<String> {
        let class = &self.classes[class];
        let names = std::iter::once(&class.name).chain(&class.synonyms);
        names.flat_map(|name| self.templates.iter().map(move |template| fill(template, name))).collect()
    }

    /// Tells which class of the task each label of a dataset is: entry i is the position in [`Task::classes`] of what the dataset calls
    /// `found[i]`. Names may be written differently ("AnnualCrop", "annual_crop"); plain numbers are taken as labels, from 0 or from 1.
    pub fn order(&self, found: &[String]) -> Result<Vec<usize>, TaskError> {
        let task = || self.id.clone();
        if found.len() != self.classes.len() {
            return Err(TaskError::Count { task: task(), expected: self.classes.len(), actual: found.len() });
        }
        let places = self.places();
        let mut order: Vec<Option<usize>> =
            found.iter().map(|name| places.get(&folded(name)).copied()).collect();
        if order.iter().any(Option::is_none)
            && let Some(numbers) = numbered(found)
        {
            order = numbers.into_iter().map(Some).collect();
        }
        let mut label_of = vec![None; self.classes.len()];
        let mut result = Vec::with_capacity(found.len());
        for (label, place) in order.into_iter().enumerate() {
            let class = found[label].clone();
            let place = place.ok_or_else(|| TaskError::UnknownClass { task: task(), label, class })?;
            if let Some(first) = label_of[place].replace(label) {
                let class = self.classes[place].name.clone();
                return Err(TaskError::Twice { task: task(), first, second: label, class });
            }
            result.push(place);
        }
        Ok(result)
    }

    /// The position of the class that a folded name stands for.
    fn places(&self) -> HashMap<String, usize> {
        let named = self.classes.iter().enumerate().flat_map(|(place, class)| {
            let names = std::iter::once(&class.name).chain(&class.synonyms).chain(&class.also);
            names.map(move |name| (folded(name), place))
        });
        named.collect()
    }
}

/// A template with its class.
pub fn fill(template: &str, class: &str) -> String {
    template.replace("{}", class)
}

/// A name in which only letters and digits count.
fn folded(name: &str) -> String {
    name.chars().filter(|letter| letter.is_alphanumeric()).flat_map(char::to_lowercase).collect()
}

/// The numbers that class names are, counted from 0, if all are.
fn numbered(found: &[String]) -> Option<Vec<usize>> {
    let numbers: Vec<usize> = found.iter().map(|name| name.parse().ok()).collect::<Option<_>>()?;
    let base = *numbers.iter().min()?;
    let in_range = base <= 1 && numbers.iter().all(|number| number - base < found.len());
    in_range.then(|| numbers.into_iter().map(|number| number - base).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn files_are_consistent() {
        let mut names = HashSet::new();
        for task in all() {
            for name in task.names() {
                assert!(names.insert(folded(name)), "`{name}` names two tasks");
                assert_eq!(name, name.to_lowercase());
            }
            assert!(!task.templates.is_empty() && !task.source.is_empty(), "{}", task.id);
            for template in &task.templates {
                assert_eq!(template.matches("{}").count(), 1, "{}: {template}", task.id);
            }
            let of_classes = task.classes.iter().map(|class| 1 + class.synonyms.len() + class.also.len());
            let folds: HashSet<String> = task
                .classes
                .iter()
                .flat_map(|class| std::iter::once(&class.name).chain(&class.synonyms).chain(&class.also))
                .map(|name| folded(name))
                .collect();
            assert!(folds.iter().all(|name| !name.is_empty()), "{}", task.id);
            // No two classes may share a name; one may repeat itself (`forest`, `Forest`).
            let places = task.places();
            for (place, class) in task.classes.iter().enumerate() {
                assert_eq!(places[&folded(&class.name)], place, "{}: {}", task.id, class.name);
            }
            assert!(folds.len() <= of_classes.sum());
        }
        assert_eq!(all().len(), 21);
    }

    #[test]
    fn tasks_have_the_classes_of_their_datasets() {
        let counts = [
            ("sun397", 397),
            ("cars", 196),
            ("resisc45", 45),
            ("eurosat", 10),
            ("svhn", 10),
            ("gtsrb", 43),
            ("mnist", 10),
            ("dtd", 47),
            ("cifar100", 100),
            ("stl10", 10),
            ("flowers102", 102),
            ("pets", 37),
            ("pcam", 2),
            ("fer2013", 7),
            ("emnist", 10),
            ("cifar10", 10),
            ("food101", 101),
            ("fashion", 10),
            ("sst2", 2),
            ("kmnist", 10),
            ("emnist-letters", 26),
        ];
        for (task, (id, classes)) in all().iter().zip(counts) {
            assert_eq!((task.id.as_str(), task.classes.len()), (id, classes));
        }
        // Datasets that number their classes in the order of sorted names do so here.
        for id in ["sun397", "resisc45", "dtd", "food101", "cifar100", "stl10"] {
            let names = find(id).unwrap().class_names();
            let key = |name: &String| name.replace(' ', "_");
            assert!(names.is_sorted_by_key(key), "{id}");
        }
    }

    #[test]
    fn tasks_are_found_by_any_spelling_and_sets_are_those_of_the_literature() {
        for name in ["Cars", "stanford-cars", "StanfordCars", "stanford_cars"] {
            assert_eq!(find(name).unwrap().id, "cars");
        }
        assert_eq!(find("RenderedSST2").unwrap().id, "sst2");
        assert_eq!(find("OxfordIIITPet").unwrap().id, "pets");
        assert!(find("imagenet").is_none());
        let ids = |size| set(size).unwrap().iter().map(|task| task.id.as_str()).collect::<Vec<_>>();
        assert_eq!(ids(8), ["sun397", "cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd"]);
        assert_eq!(ids(14)[8..], ["cifar100", "stl10", "flowers102", "pets", "pcam", "fer2013"]);
        assert_eq!(ids(20)[14..], ["emnist", "cifar10", "food101", "fashion", "sst2", "kmnist"]);
        assert!(set(9).is_none());
    }

    #[test]
    fn prompts_are_names_in_templates() {
        let mnist = find("mnist").unwrap();
        assert_eq!(mnist.prompts(7), ["a photo of the number: \"7\"."]);
        let fer = find("fer2013").unwrap();
        assert_eq!(fer.prompts(0).len(), fer.templates.len());
        assert_eq!(fer.prompts(5).len(), 3 * fer.templates.len());
        assert!(fer.prompts(5).contains(&"they look spooked.".to_owned()));
        assert_eq!(find("eurosat").unwrap().prompts(9)[1], "a centered satellite photo of a lake or sea.");
    }

    #[test]
    fn classes_are_recognized_in_any_order_and_spelling() {
        let names = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let eurosat = find("eurosat").unwrap();
        let folders = names(&[
            "AnnualCrop",
            "Forest",
            "HerbaceousVegetation",
            "Highway",
            "Industrial",
            "Pasture",
            "PermanentCrop",
            "Residential",
            "River",
            "SeaLake",
        ]);
        assert_eq!(eurosat.order(&folders).unwrap(), (0..10).collect::<Vec<_>>());
        let sorted = names(&["angry", "disgusted", "fearful", "happy", "neutral", "sad", "surprised"]);
        assert_eq!(find("fer2013").unwrap().order(&sorted).unwrap(), [0, 1, 2, 3, 6, 4, 5]);

        let numbers: Vec<String> = (0..43).map(|label| format!("{label:05}")).collect();
        assert_eq!(find("gtsrb").unwrap().order(&numbers).unwrap()[42], 42);
        let from_one: Vec<String> = (1..=10).map(|label| label.to_string()).collect();
        assert_eq!(find("cifar10").unwrap().order(&from_one).unwrap()[9], 9);
        // Of digits, the name is the number, wherever it stands.
        let shifted = names(&["1", "2", "3", "4", "5", "6", "7", "8", "9", "0"]);
        assert_eq!(find("svhn").unwrap().order(&shifted).unwrap(), [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]);
    }

    #[test]
    fn other_classes_are_named() {
        let message = |task: &str, found: &[&str]| {
            let found: Vec<String> = found.iter().map(|name| (*name).to_owned()).collect();
            find(task).unwrap().order(&found).unwrap_err().to_string()
        };
        assert_eq!(message("sst2", &["negative"]), "task `sst2` has 2 classes, the dataset 1");
        assert_eq!(
            message("sst2", &["negative", "neutral"]),
            "task `sst2` has no class `neutral` (label 1 of the dataset)"
        );
        assert_eq!(
            message("sst2", &["Positive", "positive"]),
            "labels 0 and 1 of the dataset are both class `positive` of task `sst2`"
        );
    }
}
