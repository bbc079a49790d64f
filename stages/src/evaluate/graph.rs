//! The ONNX exports that a model is run through: one graph, or the two halves of a model that has two.

use crate::kind::{SourceFile, SourceSet};
use crate::params::{FilePath, PathOr};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize;
use std::path::PathBuf;

/// What an exporter calls the external data of `graph.onnx`; such a file beside the graph is part of it.
const EXTERNAL_DATA_SUFFIXES: [&str; 2] = ["_data", ".data"];

/// The parameter under which a job finds the text export.
pub(crate) const TEXT: &str = "graph.text";

/// The parameter `graph`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(try_from = "PathOr<GraphTable>")]
pub(crate) enum Graphs {
    /// None: what is scored is a graph itself.
    #[default]
    Own,
    /// A classifier, or the image tower of CLIP with or without its text tower.
    Classifier { vision: FilePath, text: Option<FilePath> },
    /// A model that segments: image encoder, and prompt encoder with mask decoder.
    Segmenter { encoder: FilePath, decoder: FilePath },
}

/// What a table may name.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct GraphTable {
    vision: Option<FilePath>,
    text: Option<FilePath>,
    encoder: Option<FilePath>,
    decoder: Option<FilePath>,
}

/// Why a table names no model.
#[derive(Debug, thiserror::Error)]
#[error(
    "`graph` is a path, `{{ vision, text }}` (CLIP) or `{{ encoder, decoder }}` (segmentation); this has {0}"
)]
pub(crate) struct NoModel(String);

impl TryFrom<PathOr<GraphTable>> for Graphs {
    type Error = NoModel;

    fn try_from(written: PathOr<GraphTable>) -> Result<Self, NoModel> {
        let table = match written {
            PathOr::Path(vision) => return Ok(Self::Classifier { vision, text: None }),
            PathOr::Value(table) => table,
        };
        match table {
            GraphTable { vision: Some(vision), text, encoder: None, decoder: None } => {
                Ok(Self::Classifier { vision, text })
            }
            GraphTable { vision: None, text: None, encoder: Some(encoder), decoder: Some(decoder) } => {
                Ok(Self::Segmenter { encoder, decoder })
            }
            table => Err(NoModel(table.listed())),
        }
    }
}

impl GraphTable {
    fn listed(&self) -> String {
        let given = [
            ("vision", &self.vision),
            ("text", &self.text),
            ("encoder", &self.encoder),
            ("decoder", &self.decoder),
        ];
        let names: Vec<String> = given
            .into_iter()
            .filter(|(_, path)| path.is_some())
            .map(|(name, _)| format!("`{name}`"))
            .collect();
        match names.as_slice() {
            [] => "nothing".to_owned(),
            [only] => format!("{only} alone"),
            _ => names.join(", "),
        }
    }
}

impl Graphs {
    /// The graph that takes images; a preprocessor file is looked for beside it.
    pub(crate) fn of_images(&self) -> Option<&FilePath> {
        match self {
            Self::Own => None,
            Self::Classifier { vision: graph, .. } | Self::Segmenter { encoder: graph, .. } => Some(graph),
        }
    }

    /// The text tower of CLIP.
    pub(crate) fn of_text(&self) -> Option<&FilePath> {
        match self {
            Self::Classifier { text, .. } => text.as_ref(),
            Self::Own | Self::Segmenter { .. } => None,
        }
    }

    pub(crate) fn has_text(&self) -> bool {
        self.of_text().is_some()
    }

    /// The graphs by the parameter under which a job finds their files.
    pub(crate) fn named(&self) -> impl Iterator<Item = (&'static str, &FilePath)> {
        let (first, second) = match self {
            Self::Own => (None, None),
            Self::Classifier { vision, text } => {
                (Some(("graph", vision)), text.as_ref().map(|text| (TEXT, text)))
            }
            Self::Segmenter { encoder, decoder } => {
                (Some(("graph.encoder", encoder)), Some(("graph.decoder", decoder)))
            }
        };
        first.into_iter().chain(second)
    }
}

/// A graph's file, and its external data.
pub(crate) fn files(parameter: &str, graph: &FilePath) -> SourceSet {
    let main = SourceFile { label: String::new(), path: graph.path.clone() };
    let data = EXTERNAL_DATA_SUFFIXES.iter().filter_map(|suffix| {
        let mut name = graph.path.clone().into_os_string();
        name.push(suffix);
        let path = PathBuf::from(name);
        path.is_file().then(|| SourceFile { label: (*suffix).to_owned(), path })
    });
    SourceSet { parameter: parameter.to_owned(), files: std::iter::once(main).chain(data).collect() }
}

impl JsonSchema for Graphs {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "graphs".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let path = generator.subschema_for::<FilePath>();
        let names = ["vision", "text", "encoder", "decoder"];
        let properties: serde_json::Map<String, serde_json::Value> =
            names.iter().map(|name| ((*name).to_owned(), path.clone().to_value())).collect();
        let model = json_schema!({
            "type": "object",
            "properties": properties,
            "additionalProperties": false,
            "dependentRequired": { "text": ["vision"], "encoder": ["decoder"], "decoder": ["encoder"] }
        });
        json_schema!({ "anyOf": [path, model] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(name: &str) -> FilePath {
        FilePath { written: name.to_owned(), path: name.into() }
    }

    fn graphs(table: GraphTable) -> Result<Graphs, String> {
        Graphs::try_from(PathOr::Value(table)).map_err(|error| error.to_string())
    }

    #[test]
    fn a_model_has_one_graph_two_towers_or_two_halves() {
        let towers = GraphTable { vision: Some(path("v")), text: Some(path("t")), ..GraphTable::default() };
        let towers = graphs(towers).unwrap();
        let names: Vec<_> = towers.named().map(|(name, graph)| (name, graph.written.as_str())).collect();
        assert_eq!(names, [("graph", "v"), ("graph.text", "t")]);
        let halves =
            GraphTable { encoder: Some(path("e")), decoder: Some(path("d")), ..GraphTable::default() };
        assert_eq!(graphs(halves).unwrap().of_images().unwrap().written, "e");
        let vision = GraphTable { vision: Some(path("v")), ..GraphTable::default() };
        assert_eq!(graphs(vision).unwrap().named().count(), 1);
    }

    #[test]
    fn what_is_no_model_is_refused_with_what_it_has() {
        let says = |table| {
            let message = graphs(table).unwrap_err();
            message.split("; ").nth(1).unwrap().to_owned()
        };
        assert_eq!(says(GraphTable::default()), "this has nothing");
        assert_eq!(
            says(GraphTable { encoder: Some(path("e")), ..GraphTable::default() }),
            "this has `encoder` alone"
        );
        assert_eq!(
            says(GraphTable { text: Some(path("t")), ..GraphTable::default() }),
            "this has `text` alone"
        );
        assert_eq!(
            says(GraphTable {
                vision: Some(path("v")),
                encoder: Some(path("e")),
                decoder: Some(path("d")),
                ..GraphTable::default()
            }),
            "this has `vision`, `encoder`, `decoder`"
        );
    }
}
