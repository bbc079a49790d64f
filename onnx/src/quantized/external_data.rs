//! Tensors in a file beside the graph, for models that a protobuf cannot hold.

use super::DATA_FILE;
use crate::proto::{DataLocation, GraphProto, StringStringEntryProto, TensorProto};

/// Smaller tensors stay in the graph, as other exporters do it.
const SMALLEST: usize = 1024;

/// Every tensor begins at a multiple of this.
const ALIGNMENT: usize = 64;

/// Moves the data of all larger initializers out if they have more than `limit` bytes together.
pub(super) fn move_out(graph: &mut GraphProto, limit: u64) -> Option<Vec<u8>> {
    let size = |tensor: &TensorProto| tensor.raw_data.as_ref().map_or(0, |data| data.len() as u64);
    if graph.initializer.iter().map(size).sum::<u64>() <= limit {
        return None;
    }
    let mut data = Vec::new();
    for tensor in &mut graph.initializer {
        let Some(values) = tensor.raw_data.take_if(|values| values.len() >= SMALLEST) else { continue };
        data.resize(data.len().next_multiple_of(ALIGNMENT), 0);
        let entry = |key: &str, value: String| StringStringEntryProto {
            key: Some(key.to_owned()),
            value: Some(value),
        };
        tensor.external_data = vec![
            entry("location", DATA_FILE.to_owned()),
            entry("offset", data.len().to_string()),
            entry("length", values.len().to_string()),
        ];
        tensor.data_location = Some(DataLocation::External as i32);
        data.extend_from_slice(&values);
    }
    Some(data)
}
