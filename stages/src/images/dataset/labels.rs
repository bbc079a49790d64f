//! Labels as text files write them: numbers, or the names of classes.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use super::error::DatasetError;

/// Turns written labels into numbers; `path` is the file that they are from.
///
/// With `classes`, a label is the name of one or its number, all alike. Without, numbers stay what they are, and of names the sorted ones become the
/// classes.
pub(super) fn resolve(
    path: &Path,
    written: &[String],
    classes: Option<&[String]>,
) -> Result<(Vec<u32>, Option<Vec<String>>), DatasetError> {
    let places = |classes: &[String]| -> HashMap<String, u32> { classes.iter().cloned().zip(0..).collect() };
    let named =
        |places: &HashMap<String, u32>| written.iter().map(|label| places.get(label).copied()).collect();
    let numbers: Option<Vec<u32>> = written.iter().map(|label| label.parse().ok()).collect();
    let Some(classes) = classes else {
        if let Some(numbers) = numbers {
            return Ok((numbers, None));
        }
        let names: BTreeSet<&String> = written.iter().collect();
        let classes: Vec<String> = names.into_iter().cloned().collect();
        let labels: Option<Vec<u32>> = named(&places(&classes));
        return Ok((labels.unwrap_or_default(), Some(classes)));
    };
    let places = places(classes);
    let by_name: Option<Vec<u32>> = named(&places);
    if let Some(labels) = by_name.or(numbers) {
        return Ok((labels, Some(classes.to_vec())));
    }
    let index = written.iter().position(|label| !places.contains_key(label)).unwrap_or_default();
    let (path, label, classes) = (path.to_owned(), written[index].clone(), classes.len());
    Err(DatasetError::UnknownLabel { path, index, label, classes })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(
        written: &[&str],
        classes: Option<&[&str]>,
    ) -> Result<(Vec<u32>, Option<Vec<String>>), String> {
        let owned = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        let classes = classes.map(owned);
        resolve(Path::new("l.csv"), &owned(written), classes.as_deref()).map_err(|error| error.to_string())
    }

    #[test]
    fn labels_are_names_or_numbers() {
        let names = |list: &[&str]| Some(list.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>());
        assert_eq!(resolved(&["3", "0"], None), Ok((vec![3, 0], None)));
        assert_eq!(resolved(&["cat", "ant", "cat"], None), Ok((vec![1, 0, 1], names(&["ant", "cat"]))));
        let classes = Some(&["cat", "ant"][..]);
        assert_eq!(resolved(&["ant", "cat"], classes), Ok((vec![1, 0], names(&["cat", "ant"]))));
        assert_eq!(resolved(&["1", "0"], classes), Ok((vec![1, 0], names(&["cat", "ant"]))));
        // Names win over numbers: of the digits 1 to 3, "1" is the first class.
        assert_eq!(resolved(&["1"], Some(&["1", "2", "3"])).unwrap().0, [0]);
        assert_eq!(resolved(&[], None), Ok((vec![], None)));
        assert_eq!(
            resolved(&["cat", "bee"], classes).unwrap_err(),
            "`l.csv`: image 1 has label `bee`, which is neither the name nor the number of one of the 2 classes"
        );
    }
}
