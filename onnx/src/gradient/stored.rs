//! Trained weights as the checkpoint stores them.

use super::forward::Forward;
use super::tape::{ints_attribute, node};
use crate::binding::{How, Source};

impl Forward {
    /// Lets weights that an exporter has transposed be fed, and their gradients be given, as they are in the checkpoint: a product reads and writes
    /// a transpose as fast, and nobody has to turn them at every step.
    pub(super) fn feed_as_stored(&mut self, names: &[&str]) {
        for slot in self.weights.iter_mut().filter(|slot| names.contains(&slot.name.as_str())) {
            let Source::Tensor { how, .. } = &mut slot.source else { continue };
            let &[rows, columns] = &slot.shape[..] else { continue };
            if *how != How::Transposed {
                continue;
            }
            *how = How::SameBytes;
            slot.shape = vec![columns, rows];
            let turned = self.tape.fresh("Transpose");
            for input in self.tape.nodes.iter_mut().flat_map(|n| &mut n.input).filter(|i| **i == slot.name) {
                input.clone_from(&turned);
            }
            let swap = vec![ints_attribute("perm", &[1, 0])];
            self.tape.nodes.insert(0, node("Transpose", vec![slot.name.clone()], vec![turned.clone()], swap));
            self.tape.shapes.insert(turned, vec![rows, columns]);
            self.values.shapes.insert(slot.name.clone(), slot.shape.clone());
        }
    }
}
