//! One choice for every item, least total value within a limit on total weight: the multiple-choice knapsack.
//!
//! Bits of tensors are such a choice: weight and value are bytes and error, or error and bytes.
//!
//! First greedily. Of each item, only choices on the lower convex hull of (weight, value) are looked at; going along it, every step costs
//! weight and gains value, the best gain per weight first. Steps of all items are taken in the order of that ratio while they fit.
//! Relaxed to fractions of steps, the problem is solved by exactly this order up to the limit (the hull is the item's best
//! fractional value at every weight, and convex, so that exchanging a step for a worse one never helps). Let g be the gain of the first step that does
//! not fit, and f < 1 the fraction of it that would: the relaxed optimum is the greedy value less f·g, and no choice is better than that. So the
//! greedy value is within g of the best, one step of one item. Later steps that still fit only make it better.
//!
//! Then exactly (Nemhauser and Ullmann, Management Science 15, 1969): item after item, keep the (weight, value) pairs of all partial choices
//! that no other beats in both, and drop those whose relaxed bound on the whole is no better than the best solution known. Where more
//! than [`MOST_STATES`] are left, the greedy solution stands with its bound.

/// A way to choose for one item.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Choice {
    /// Finite and not negative.
    pub(super) weight: f64,
    /// Finite and not negative.
    pub(super) value: f64,
}

/// What was chosen.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Solution {
    /// The choice of each item.
    pub(super) picks: Vec<usize>,
    pub(super) weight: f64,
    pub(super) value: f64,
    /// No choice within the limit has less value than this; of an optimal solution, its value.
    pub(super) bound: f64,
}

/// Partial choices that are kept at most; enough for models of hundreds of tensors.
const MOST_STATES: usize = 1 << 16;

/// Relative differences below this are round-off of sums.
const ROUND_OFF: f64 = 1e-12;

/// The least value within the limit. Nothing if even the lightest choices exceed it; every item has a choice.
pub(super) fn solve(items: &[Vec<Choice>], limit: f64) -> Option<Solution> {
    let hulls: Vec<Vec<usize>> = items.iter().map(|choices| hull(choices)).collect();
    let greedy = greedy(items, &hulls, limit)?;
    Some(exact(items, &hulls, limit, &greedy).unwrap_or(greedy))
}

/// The choices on the lower convex hull, from the lightest to that of least value.
fn hull(choices: &[Choice]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..choices.len()).collect();
    let by = |a: &usize, b: &usize| {
        let (a, b) = (choices[*a], choices[*b]);
        a.weight.total_cmp(&b.weight).then(a.value.total_cmp(&b.value))
    };
    order.sort_by(|a, b| by(a, b).then(a.cmp(b)));
    let mut hull: Vec<usize> = Vec::new();
    for index in order {
        if hull.last().is_some_and(|last| choices[*last].value <= choices[index].value) {
            continue;
        }
        while let [.., before, last] = hull.as_slice() {
            let (a, b, c) = (choices[*before], choices[*last], choices[index]);
            // b is above the line from a to c.
            if (a.value - b.value) * (c.weight - b.weight) > (b.value - c.value) * (b.weight - a.weight) {
                break;
            }
            hull.pop();
        }
        hull.push(index);
    }
    hull
}

/// A step along the hull of an item.
#[derive(Clone, Copy)]
struct Step {
    item: usize,
    /// The hull's entry that it leads to.
    to: usize,
    weight: f64,
    gain: f64,
}

/// The steps of some items, the best gain per weight first; those of one item come in their order.
fn steps<'a>(
    items: &'a [Vec<Choice>],
    hulls: &'a [Vec<usize>],
    of: impl Iterator<Item = usize>,
) -> Vec<Step> {
    let mut steps: Vec<Step> = of
        .flat_map(|item| {
            hulls[item].windows(2).enumerate().map(move |(from, pair)| {
                let (a, b) = (items[item][pair[0]], items[item][pair[1]]);
                Step { item, to: from + 1, weight: b.weight - a.weight, gain: a.value - b.value }
            })
        })
        .collect();
    steps.sort_by(|a, b| {
        let (left, right) = (a.gain * b.weight, b.gain * a.weight);
        right.total_cmp(&left).then((a.item, a.to).cmp(&(b.item, b.to)))
    });
    steps
}

fn total(items: &[Vec<Choice>], picks: &[usize]) -> Choice {
    let chosen = items.iter().zip(picks).map(|(choices, pick)| choices[*pick]);
    chosen.fold(Choice { weight: 0.0, value: 0.0 }, |sum, choice| Choice {
        weight: sum.weight + choice.weight,
        value: sum.value + choice.value,
    })
}

fn greedy(items: &[Vec<Choice>], hulls: &[Vec<usize>], limit: f64) -> Option<Solution> {
    let mut level = vec![0usize; items.len()];
    let picks = |level: &[usize]| -> Vec<usize> {
        hulls.iter().zip(level).map(|(hull, level)| hull[*level]).collect()
    };
    let start = total(items, &picks(&level));
    if start.weight > limit {
        return None;
    }
    let (mut weight, mut value) = (start.weight, start.value);
    let mut bound = None;
    for step in steps(items, hulls, 0..items.len()) {
        // After a step that did not fit, those of its item behind it do not follow.
        if level[step.item] + 1 != step.to {
            continue;
        }
        if weight + step.weight <= limit {
            level[step.item] = step.to;
            weight += step.weight;
            value -= step.gain;
        } else if bound.is_none() {
            bound = Some(value - step.gain * (limit - weight) / step.weight);
        }
    }
    let picks = picks(&level);
    let Choice { weight, value } = total(items, &picks);
    Some(Solution { picks, weight, value, bound: bound.map_or(value, |bound| bound.max(0.0).min(value)) })
}

/// What the items from one position on can still do, relaxed to fractions of steps.
struct Rest {
    lightest: Choice,
    /// Weight and gain of all steps so far, in their order.
    sums: Vec<Choice>,
}

impl Rest {
    /// A value that no choice of these items within `room` is below; infinite if none fits.
    fn bound(&self, room: f64) -> f64 {
        let room = room - self.lightest.weight;
        if room < 0.0 {
            return f64::INFINITY;
        }
        let fitting = self.sums.partition_point(|sum| sum.weight <= room);
        let before = if fitting == 0 { Choice { weight: 0.0, value: 0.0 } } else { self.sums[fitting - 1] };
        let part = self.sums.get(fitting).map_or(0.0, |next| {
            (next.value - before.value) * (room - before.weight) / (next.weight - before.weight)
        });
        self.lightest.value - before.value - part
    }
}

/// A partial choice: of the items so far.
#[derive(Clone, Copy)]
struct State {
    weight: f64,
    value: f64,
    /// The state of one item less that it continues, and the choice.
    from: u32,
    pick: u32,
}

/// Nothing if there were too many partial choices, or none better than the greedy one.
fn exact(items: &[Vec<Choice>], hulls: &[Vec<usize>], limit: f64, greedy: &Solution) -> Option<Solution> {
    if greedy.value <= greedy.bound * (1.0 + ROUND_OFF) {
        return None;
    }
    // Items that decide most first: later ones have good bounds.
    let spread = |item: usize| {
        let values = items[item].iter().map(|choice| choice.value);
        values.clone().fold(0.0, f64::max) - values.fold(f64::INFINITY, f64::min)
    };
    let mut order: Vec<usize> = (0..items.len()).collect();
    order.sort_by(|&a, &b| spread(b).total_cmp(&spread(a)).then(a.cmp(&b)));
    let mut layers: Vec<Vec<State>> = vec![vec![State { weight: 0.0, value: 0.0, from: 0, pick: 0 }]];
    let beats = greedy.value * (1.0 - ROUND_OFF);
    for (position, &item) in order.iter().enumerate() {
        let rest = rest(items, hulls, &order[position + 1..]);
        let before = layers.last().map(Vec::as_slice).unwrap_or_default();
        let mut next = Vec::new();
        for (from, state) in before.iter().enumerate() {
            for (pick, choice) in items[item].iter().enumerate() {
                let (weight, value) = (state.weight + choice.weight, state.value + choice.value);
                if weight <= limit && value + rest.bound(limit - weight) < beats {
                    next.push(State { weight, value, from: from as u32, pick: pick as u32 });
                }
            }
        }
        next.sort_by(|a: &State, b: &State| {
            a.weight
                .total_cmp(&b.weight)
                .then(a.value.total_cmp(&b.value))
                .then((a.from, a.pick).cmp(&(b.from, b.pick)))
        });
        let mut least = f64::INFINITY;
        next.retain(|state| {
            let better = state.value < least;
            least = least.min(state.value);
            better
        });
        if next.len() > MOST_STATES {
            return None;
        }
        layers.push(next);
    }
    let last = layers.last()?;
    let best = (0..last.len()).min_by(|&a, &b| last[a].value.total_cmp(&last[b].value))?;
    let mut picks = vec![0; items.len()];
    let mut at = best;
    for (position, &item) in order.iter().enumerate().rev() {
        let state = layers[position + 1][at];
        picks[item] = state.pick as usize;
        at = state.from as usize;
    }
    let Choice { weight, value } = total(items, &picks);
    Some(Solution { picks, weight, value, bound: value })
}

fn rest(items: &[Vec<Choice>], hulls: &[Vec<usize>], of: &[usize]) -> Rest {
    let mut lightest = Choice { weight: 0.0, value: 0.0 };
    for &item in of {
        let choice = items[item][hulls[item][0]];
        lightest.weight += choice.weight;
        lightest.value += choice.value;
    }
    let mut sum = Choice { weight: 0.0, value: 0.0 };
    let sums = steps(items, hulls, of.iter().copied())
        .into_iter()
        .map(|step| {
            sum = Choice { weight: sum.weight + step.weight, value: sum.value + step.gain };
            sum
        })
        .collect();
    Rest { lightest, sums }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn choice(weight: f64, value: f64) -> Choice {
        Choice { weight, value }
    }

    /// All combinations.
    fn brute_force(items: &[Vec<Choice>], limit: f64) -> Option<f64> {
        let Some((first, rest)) = items.split_first() else { return (limit >= 0.0).then_some(0.0) };
        let totals = first.iter().filter_map(|choice| {
            let rest = (choice.weight <= limit).then(|| brute_force(rest, limit - choice.weight))??;
            Some(choice.value + rest)
        });
        totals.min_by(f64::total_cmp)
    }

    #[test]
    fn the_hull_leaves_what_lies_below_the_lines() {
        let choices =
            [choice(4.0, 1.0), choice(1.0, 10.0), choice(2.0, 9.0), choice(3.0, 2.0), choice(5.0, 1.0)];
        assert_eq!(hull(&choices), [1, 3, 0]);
        assert_eq!(hull(&[choice(1.0, 2.0), choice(1.0, 2.0)]), [0]);
        assert_eq!(hull(&[choice(2.0, 0.0)]), [0]);
    }

    #[test]
    fn limits_that_nothing_keeps_and_no_items() {
        let items = vec![vec![choice(2.0, 1.0)], vec![choice(1.0, 5.0), choice(3.0, 0.0)]];
        assert_eq!(solve(&items, 2.9), None);
        assert_eq!(solve(&items, 3.0).unwrap().picks, [0, 0]);
        let best = solve(&items, 5.0).unwrap();
        assert_eq!((best.picks, best.weight, best.value, best.bound), (vec![0, 1], 5.0, 1.0, 1.0));
        assert_eq!(solve(&[], 0.0).unwrap().picks, Vec::<usize>::new());
    }

    #[test]
    fn the_exact_solution_uses_what_the_greedy_one_leaves() {
        // The best ratio first takes item 0 and leaves no room for item 1, which alone is worth more.
        let items =
            vec![vec![choice(0.0, 5.0), choice(1.0, 0.0)], vec![choice(0.0, 40.0), choice(10.0, 0.0)]];
        let hulls: Vec<_> = items.iter().map(|choices| hull(choices)).collect();
        let greedy = greedy(&items, &hulls, 10.0).unwrap();
        assert_eq!((greedy.value, greedy.bound), (40.0, 4.0));
        let best = solve(&items, 10.0).unwrap();
        assert_eq!((best.value, best.bound), (5.0, 5.0));
    }

    /// Like bytes and errors: whole weights that double, values that fall.
    fn instance() -> impl Strategy<Value = (Vec<Vec<Choice>>, f64)> {
        let item = prop::collection::vec((0u8..40, 0u16..1000), 1..5)
            .prop_map(|pairs| pairs.into_iter().map(|(w, v)| choice(f64::from(w), f64::from(v))).collect());
        (prop::collection::vec(item, 0..7), (0u16..200).prop_map(f64::from))
    }

    proptest! {
        #[test]
        fn solutions_are_the_best_of_all((items, limit) in instance()) {
            let best = brute_force(&items, limit);
            let found = solve(&items, limit);
            prop_assert_eq!(best.is_some(), found.is_some());
            if let (Some(best), Some(found)) = (best, found) {
                prop_assert!(found.weight <= limit);
                prop_assert_eq!(found.value, best);
                prop_assert!(found.bound <= best);
                let chosen = total(&items, &found.picks);
                prop_assert_eq!((chosen.weight, chosen.value), (found.weight, found.value));
            }
        }

        #[test]
        fn the_greedy_bound_holds((items, limit) in instance()) {
            let hulls: Vec<_> = items.iter().map(|choices| hull(choices)).collect();
            if let (Some(best), Some(greedy)) = (brute_force(&items, limit), greedy(&items, &hulls, limit)) {
                let largest = steps(&items, &hulls, 0..items.len()).iter().map(|step| step.gain).fold(0.0, f64::max);
                prop_assert!(greedy.bound <= best && best <= greedy.value);
                prop_assert!(greedy.value <= best + largest + 1e-9);
            }
        }
    }

    #[test]
    fn a_model_of_hundreds_of_tensors_is_solved() {
        let items: Vec<Vec<Choice>> = (0..300usize)
            .map(|tensor| {
                let (size, scale) =
                    ((tensor * 7919 % 97 + 1) as f64 * 64.0, (tensor * 104_729 % 1009 + 1) as f64);
                (2..9).map(|bits| choice(size * f64::from(bits), scale * 0.25f64.powi(bits))).collect()
            })
            .collect();
        let size: f64 = items.iter().map(|choices| choices[0].weight / 2.0).sum();
        let found = solve(&items, 3.0 * size).unwrap();
        assert!(
            found.weight <= 3.0 * size && found.value <= found.bound * 1.001,
            "{} {}",
            found.value,
            found.bound
        );
    }
}
