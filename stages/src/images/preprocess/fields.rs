//! Reading typed fields out of a JSON object, with messages that name file and field. `null` counts as absent.

use serde_json::{Map, Value};

use super::config::Normalize;
use super::error::PreprocessError;
use super::taps::Filter;

/// The largest side that is accepted; guards against absurd memory use.
const MAX_SIDE: u64 = 1 << 14;

/// An object of a configuration file; `origin` names the file in messages.
pub(super) struct Reader<'a> {
    pub(super) origin: &'a str,
    pub(super) fields: &'a Map<String, Value>,
}

impl<'a> Reader<'a> {
    /// Reads an object.
    pub(super) fn new(value: &'a Value, origin: &'a str) -> Result<Self, PreprocessError> {
        let Value::Object(fields) = value else {
            return Err(PreprocessError::Field {
                origin: origin.to_owned(),
                field: "(the whole file)".to_owned(),
                expected: "an object".to_owned(),
                found: value.to_string(),
            });
        };
        Ok(Self { origin, fields })
    }

    pub(super) fn get(&self, field: &str) -> Option<&'a Value> {
        self.fields.get(field).filter(|value| !value.is_null())
    }

    pub(super) fn flag(&self, field: &str, default: bool) -> Result<bool, PreprocessError> {
        match self.get(field) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(self.wrong(field, "true or false", other)),
        }
    }

    pub(super) fn text(&self, field: &str) -> Result<Option<&str>, PreprocessError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(field, "a string", other)),
        }
    }

    pub(super) fn number(&self, field: &str, default: f64) -> Result<f64, PreprocessError> {
        let Some(value) = self.get(field) else { return Ok(default) };
        value.as_f64().ok_or_else(|| self.wrong(field, "a number", value))
    }

    /// Reads one number for all channels, or one for each of one or three channels.
    pub(super) fn numbers(&self, field: &str, default: &[f64]) -> Result<Vec<f64>, PreprocessError> {
        let Some(value) = self.get(field) else { return Ok(default.to_vec()) };
        let numbers: Option<Vec<f64>> = match value {
            Value::Number(number) => number.as_f64().map(|number| vec![number]),
            Value::Array(values) => values.iter().map(Value::as_f64).collect(),
            _ => None,
        };
        numbers
            .filter(|numbers| matches!(numbers.len(), 1 | 3))
            .ok_or_else(|| self.wrong(field, "a number or a list of 1 or 3 numbers", value))
    }

    pub(super) fn side(&self, field: &str, value: &Value) -> Result<usize, PreprocessError> {
        match value.as_u64() {
            Some(side) if (1..=MAX_SIDE).contains(&side) => Ok(side as usize),
            _ => Err(self.wrong(field, &format!("a whole number from 1 to {MAX_SIDE}"), value)),
        }
    }

    pub(super) fn resample(&self, field: &str, default: Filter) -> Result<Filter, PreprocessError> {
        let Some(value) = self.get(field) else { return Ok(default) };
        let filter = match value {
            Value::Number(number) => number.as_u64().and_then(Filter::from_number),
            Value::String(name) => Filter::from_name(name),
            _ => None,
        };
        filter.ok_or_else(|| {
            let names: Vec<_> = Filter::ALL.iter().map(|filter| format!("\"{}\"", filter.name())).collect();
            self.wrong(field, &format!("a number from 0 to 5 or one of {}", names.join(", ")), value)
        })
    }

    /// Reads mean and standard deviation; `names` are the fields' names.
    pub(super) fn mean_and_std(
        &self,
        names: [&str; 2],
        defaults: [&[f64]; 2],
    ) -> Result<Normalize, PreprocessError> {
        let mean = self.numbers(names[0], defaults[0])?;
        let std = self.numbers(names[1], defaults[1])?;
        if std.contains(&0.0) {
            return Err(self.wrong(names[1], "different from zero", &self.fields[names[1]]));
        }
        Ok(Normalize { mean, std })
    }

    pub(super) fn wrong(&self, field: &str, expected: &str, found: &Value) -> PreprocessError {
        PreprocessError::Field {
            origin: self.origin.to_owned(),
            field: field.to_owned(),
            expected: expected.to_owned(),
            found: found.to_string(),
        }
    }
}
