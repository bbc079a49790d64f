//! Parts of tensors, and tensors with their axes in another order, without copying them.

/// Where the elements of a tensor lie among those of another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct View {
    /// of the first element
    offset: usize,
    shape: Vec<usize>,
    /// how far neighbours along an axis are apart
    strides: Vec<usize>,
}

/// A stack of matrices in a view: those of the last two axes.
pub(super) struct Matrices<'v> {
    offset: usize,
    stack: &'v [usize],
    stack_strides: &'v [usize],
    /// rows and columns
    pub(super) size: [usize; 2],
    pub(super) strides: [usize; 2],
}

impl View {
    /// A whole tensor as it is.
    pub(crate) fn whole(shape: Vec<usize>) -> Self {
        let mut strides = vec![1; shape.len()];
        for i in (1..shape.len()).rev() {
            strides[i - 1] = strides[i] * shape[i];
        }
        Self { offset: 0, shape, strides }
    }

    pub(crate) fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Axis `i` becomes axis `order[i]` of what was there.
    pub(crate) fn transposed(&self, order: &[usize]) -> Option<Self> {
        let pick =
            |values: &[usize]| order.iter().map(|&o| values.get(o).copied()).collect::<Option<Vec<usize>>>();
        Some(Self { offset: self.offset, shape: pick(&self.shape)?, strides: pick(&self.strides)? })
    }

    /// Cuts `start..start + length` out of an axis.
    pub(crate) fn cut(&self, axis: usize, start: usize, length: usize) -> Option<Self> {
        if start + length > *self.shape.get(axis)? {
            return None;
        }
        let mut cut = self.clone();
        cut.offset += start * self.strides[axis];
        cut.shape[axis] = length;
        Some(cut)
    }

    /// Returns the same elements in the same order under another shape, unless they would have to be copied for it.
    pub(crate) fn reshaped(&self, shape: &[usize]) -> Option<Self> {
        let n: usize = self.shape.iter().product();
        if n == 0 || n != shape.iter().product::<usize>() {
            return None;
        }
        let mut old = self.shape.iter().zip(&self.strides).filter(|(n, _)| **n != 1).peekable();
        let mut strides = vec![1; shape.len()];
        let mut i = 0;
        while i < shape.len() {
            if shape[i] == 1 {
                i += 1;
                continue;
            }
            // Axes that together have as many elements before and after.
            let (&before, &stride) = old.next()?;
            let (mut before, mut stride) = (before, stride);
            let (first, mut after) = (i, shape[i]);
            i += 1;
            while before != after {
                if before < after {
                    let (&n, &inner) = old.next()?;
                    if stride != n * inner {
                        return None;
                    }
                    (before, stride) = (before * n, inner);
                } else {
                    after *= shape.get(i)?;
                    i += 1;
                }
            }
            for axis in (first..i).rev() {
                strides[axis] = stride;
                stride *= shape[axis];
            }
        }
        Some(Self { offset: self.offset, shape: shape.to_vec(), strides })
    }

    /// Whether the last or the last but one axis has its elements beside each other, as factors need to.
    pub(crate) fn has_matrices(&self) -> bool {
        self.matrices(false).is_some_and(|m| (0..2).any(|i| m.strides[i] == 1 || m.size[i] == 1))
    }

    pub(crate) fn to_attribute(&self) -> Vec<i64> {
        [self.offset].iter().chain(&self.shape).chain(&self.strides).map(|&v| v as i64).collect()
    }

    pub(super) fn from_attribute(values: &[i64]) -> Option<Self> {
        let values: Vec<usize> = values.iter().map(|&v| usize::try_from(v).ok()).collect::<Option<_>>()?;
        let (&offset, rest) = values.split_first()?;
        let (shape, strides) = rest.split_at(rest.len() / 2);
        (shape.len() == strides.len()).then(|| Self {
            offset,
            shape: shape.to_vec(),
            strides: strides.to_vec(),
        })
    }

    pub(super) fn matrices(&self, transposed: bool) -> Option<Matrices<'_>> {
        let (stack, size) = self.shape.split_last_chunk::<2>()?;
        let (stack_strides, strides) = self.strides.split_last_chunk::<2>()?;
        let (mut size, mut strides) = (*size, *strides);
        if transposed {
            size.reverse();
            strides.reverse();
        }
        Some(Matrices { offset: self.offset, stack, stack_strides, size, strides })
    }
}

impl Matrices<'_> {
    pub(super) fn stack(&self) -> &[usize] {
        self.stack
    }

    /// Returns where matrix `i` of the stack begins.
    pub(super) fn offset(&self, mut i: usize) -> usize {
        let mut offset = self.offset;
        for (&n, &stride) in self.stack.iter().zip(self.stack_strides).rev() {
            offset += i % n * stride;
            i /= n;
        }
        offset
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the places of all elements in order.
    fn places(view: &View) -> Vec<usize> {
        let mut places = vec![view.offset];
        for (&n, &stride) in view.shape.iter().zip(&view.strides) {
            places = places.iter().flat_map(|place| (0..n).map(move |i| place + i * stride)).collect();
        }
        places
    }

    #[test]
    fn views_know_where_elements_lie() {
        let view = View::whole(vec![2, 3, 4]);
        assert_eq!(places(&view), (0..24).collect::<Vec<_>>());
        let turned = view.transposed(&[1, 2, 0]).unwrap();
        assert_eq!(turned.shape(), [3, 4, 2]);
        assert_eq!(places(&turned)[..4], [0, 12, 1, 13]);
        let cut = turned.cut(0, 1, 2).unwrap();
        assert_eq!(places(&cut), places(&turned)[8..]);
        assert_eq!(view.cut(1, 2, 2), None);
        assert_eq!(view.transposed(&[0, 3, 1]), None);
    }

    #[test]
    fn shapes_change_where_nothing_has_to_be_copied() {
        let turned = View::whole(vec![2, 3, 4, 5]).transposed(&[0, 2, 1, 3]).unwrap();
        for shape in [vec![1, 2, 4, 1, 3, 5], vec![2, 2, 2, 3, 5, 1], vec![2, 4, 3, 5]] {
            let reshaped = turned.reshaped(&shape).unwrap();
            assert_eq!(reshaped.shape(), shape);
            assert_eq!(places(&reshaped), places(&turned));
        }
        assert_eq!(turned.reshaped(&[8, 3, 5]), None);
        assert_eq!(turned.reshaped(&[2, 4, 15]), None);
        assert_eq!(turned.reshaped(&[2, 4, 3, 4]), None);
        let whole = View::whole(vec![6, 4]).reshaped(&[2, 12]).unwrap().reshaped(&[2, 3, 2, 2]).unwrap();
        assert_eq!(places(&whole), (0..24).collect::<Vec<_>>());
        assert_eq!(View::whole(vec![1, 1]).reshaped(&[1]).map(|v| places(&v)), Some(vec![0]));
        assert_eq!(View::whole(vec![0, 4]).reshaped(&[0]), None);
    }

    #[test]
    fn an_attribute_holds_a_view() {
        let view = View::whole(vec![2, 3, 4, 5]).transposed(&[0, 2, 1, 3]).unwrap().cut(1, 1, 2).unwrap();
        assert_eq!(View::from_attribute(&view.to_attribute()), Some(view.clone()));
        for damaged in [&[][..], &[0, 1], &[-1, 2, 3], &[0, 2, -3]] {
            assert_eq!(View::from_attribute(damaged), None, "{damaged:?}");
        }
        let matrices = view.matrices(true).unwrap();
        assert_eq!((matrices.stack(), matrices.size, matrices.strides), (&[2, 2][..], [5, 3], [1, 20]));
        assert_eq!((0..4).map(|i| matrices.offset(i)).collect::<Vec<_>>(), [5, 10, 65, 70]);
        assert!(view.has_matrices());
        assert!(!view.transposed(&[3, 0, 1, 2]).unwrap().has_matrices());
    }
}
