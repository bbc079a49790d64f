//! Weights by cluster: tasks that point the same way share what their cluster counts.
//!
//! The points are the task vectors, flattened and scaled to length 1; all distances follow from their inner products. k-means: k-means++
//! seeding, the best of [`RESTARTS`] by the sum of squared distances, random numbers from the seed alone. Ward: the two clusters whose
//! union adds least to that sum are joined until k are left.

use super::performance::{Performance, softmax};
use crate::params::Problem;
use crate::{Job, StageError};
use serde::{Deserialize, Serialize};

const RESTARTS: u64 = 10;

/// Rounds of k-means; it stops by itself long before.
const MAX_ROUNDS: usize = 300;

/// How tasks are clustered and counted.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Clusters {
    /// k.
    pub cluster: usize,
    pub linkage: Linkage,
    pub seed: u64,
    /// How clusters count among each other.
    pub across: Share,
    /// How the tasks of a cluster count among each other.
    pub within: Share,
    /// For shares by performance.
    pub performance: Option<Performance>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Linkage {
    #[default]
    KMeans,
    Ward,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Share {
    #[default]
    Equal,
    /// softmax(accuracy / temperature); of a cluster, its mean accuracy.
    Performance,
}

impl Clusters {
    pub(super) fn check(&self, members: &[String]) -> Result<(), Problem> {
        if self.cluster > members.len() {
            let message = format!("{} tasks cannot form {} clusters", members.len(), self.cluster);
            return Err(Problem::new("bad-value", message));
        }
        Ok(())
    }

    /// Weights with the mean 1, from the inner products of the task vectors.
    pub(super) fn weights(
        &self,
        job: &Job<'_>,
        tasks: &[&str],
        gram: &[f64],
    ) -> Result<Vec<f64>, StageError> {
        let n = tasks.len();
        let labels = self.labels(&normalized(gram, n), n);
        let n_clusters = labels.iter().max().map_or(0, |last| last + 1);
        let accuracies = match &self.performance {
            Some(performance) => performance.of_tasks(job, tasks)?,
            None => vec![1.0; n],
        };
        let temperature = self.performance.as_ref().map_or(1.0, |performance| performance.temperature);
        let shares = |how: Share, values: &[f64]| match how {
            Share::Equal => vec![1.0 / values.len() as f64; values.len()],
            Share::Performance => softmax(values, temperature),
        };
        let members = |cluster: usize| (0..n).filter(|task| labels[*task] == cluster).collect::<Vec<_>>();
        let mean = |cluster: usize| {
            let members = members(cluster);
            members.iter().map(|task| accuracies[*task]).sum::<f64>() / members.len() as f64
        };
        let across = shares(self.across, &(0..n_clusters).map(mean).collect::<Vec<_>>());
        let mut weights = vec![0.0; n];
        for (cluster, share) in across.into_iter().enumerate() {
            let members = members(cluster);
            let own: Vec<f64> = members.iter().map(|task| accuracies[*task]).collect();
            for (task, part) in members.iter().zip(shares(self.within, &own)) {
                weights[*task] = share * part * n as f64;
            }
        }
        Ok(weights)
    }

    /// The cluster of each task; clusters are numbered in the order of their first tasks.
    fn labels(&self, gram: &[f64], n: usize) -> Vec<usize> {
        let k = self.cluster.clamp(1, n.max(1));
        let found = match self.linkage {
            Linkage::KMeans => k_means(gram, n, k, self.seed),
            Linkage::Ward => ward(gram, n, k),
        };
        let mut names: Vec<usize> = Vec::new();
        found
            .into_iter()
            .map(|label| {
                names.iter().position(|name| *name == label).unwrap_or_else(|| {
                    names.push(label);
                    names.len() - 1
                })
            })
            .collect()
    }
}

/// Inner products of the vectors scaled to length 1; of a zero vector, 0.
fn normalized(gram: &[f64], n: usize) -> Vec<f64> {
    let scale = |t: usize| if gram[t * n + t] > 0.0 { gram[t * n + t].sqrt().recip() } else { 0.0 };
    let pairs = (0..n).flat_map(|s| (0..n).map(move |t| (s, t)));
    pairs.map(|(s, t)| gram[s * n + t] * scale(s) * scale(t)).collect()
}

/// Squared distance of a point from the mean of some points.
fn distance(gram: &[f64], n: usize, point: usize, members: &[usize]) -> f64 {
    let size = members.len() as f64;
    let to_members: f64 = members.iter().map(|member| gram[point * n + member]).sum();
    let among: f64 = members.iter().flat_map(|a| members.iter().map(move |b| gram[a * n + b])).sum();
    (gram[point * n + point] - 2.0 * to_members / size + among / (size * size)).max(0.0)
}

fn k_means(gram: &[f64], n: usize, k: usize, seed: u64) -> Vec<usize> {
    let mut best: Option<(f64, Vec<usize>)> = None;
    for restart in 0..RESTARTS {
        let (inertia, labels) = one_k_means(gram, n, k, seed, restart);
        // A later start must be better by more than rounding, so that equal solutions do not depend on the last bits.
        if best.as_ref().is_none_or(|(least, _)| inertia < least * (1.0 - 1e-9)) {
            best = Some((inertia, labels));
        }
    }
    best.map(|(_, labels)| labels).unwrap_or_default()
}

/// One start of k-means: the sum of squared distances, and the labels.
fn one_k_means(gram: &[f64], n: usize, k: usize, seed: u64, restart: u64) -> (f64, Vec<usize>) {
    let mut clusters: Vec<Vec<usize>> = Vec::new();
    for step in 0..k {
        let nearest = |point: usize| {
            let distances = clusters.iter().map(|center| distance(gram, n, point, center));
            distances.fold(f64::INFINITY, f64::min)
        };
        let chances: Vec<f64> = (0..n).map(|point| if step == 0 { 1.0 } else { nearest(point) }).collect();
        let is_center = |point: &usize| clusters.iter().any(|center| center[0] == *point);
        let drawn = draw(&chances, uniform(seed, restart, step as u64));
        // all other points lie on centers: take any of them
        let drawn = drawn.or_else(|| (0..n).find(|point| !is_center(point)));
        clusters.extend(drawn.map(|point| vec![point]));
    }
    let mut labels = vec![usize::MAX; n];
    for _ in 0..MAX_ROUNDS {
        let nearest = |point: usize| {
            let mut best = (f64::INFINITY, 0);
            for (label, members) in clusters.iter().enumerate().filter(|(_, members)| !members.is_empty()) {
                let found = distance(gram, n, point, members);
                if found < best.0 {
                    best = (found, label);
                }
            }
            best
        };
        let found: Vec<(f64, usize)> = (0..n).map(nearest).collect();
        let mut next: Vec<usize> = found.iter().map(|(_, label)| *label).collect();
        // a cluster that lost all its points takes the one farthest from its center
        for label in 0..clusters.len() {
            if !next.contains(&label) {
                let movable = |point: &usize| next.iter().filter(|other| **other == next[*point]).count() > 1;
                let farthest = (0..n).filter(movable).max_by(|a, b| found[*a].0.total_cmp(&found[*b].0));
                if let Some(point) = farthest {
                    next[point] = label;
                }
            }
        }
        let is_done = next == labels;
        labels = next;
        for (label, members) in clusters.iter_mut().enumerate() {
            *members = (0..n).filter(|point| labels[*point] == label).collect();
        }
        if is_done {
            break;
        }
    }
    let inertia = (0..n).map(|point| distance(gram, n, point, &clusters[labels[point]])).sum();
    (inertia, labels)
}

fn ward(gram: &[f64], n: usize, k: usize) -> Vec<usize> {
    let mut clusters: Vec<Vec<usize>> = (0..n).map(|point| vec![point]).collect();
    while clusters.len() > k {
        let mut best = (f64::INFINITY, 0, 0);
        for a in 0..clusters.len() {
            for b in a + 1..clusters.len() {
                let (sizes, cost) =
                    (clusters[a].len() + clusters[b].len(), between(gram, n, &clusters[a], &clusters[b]));
                let cost = cost * (clusters[a].len() * clusters[b].len()) as f64 / sizes as f64;
                if cost < best.0 {
                    best = (cost, a, b);
                }
            }
        }
        let joined = clusters.remove(best.2);
        clusters[best.1].extend(joined);
    }
    let label = |point: usize| clusters.iter().position(|members| members.contains(&point)).unwrap_or(0);
    (0..n).map(label).collect()
}

/// Squared distance of the means of two clusters.
fn between(gram: &[f64], n: usize, a: &[usize], b: &[usize]) -> f64 {
    let mean = |a: &[usize], b: &[usize]| {
        let sum: f64 = a.iter().flat_map(|x| b.iter().map(move |y| gram[x * n + y])).sum();
        sum / (a.len() * b.len()) as f64
    };
    mean(a, a) + mean(b, b) - 2.0 * mean(a, b)
}

/// The index at which the running sum of `chances` passes a share of their total; `None` if all are 0.
fn draw(chances: &[f64], share: f64) -> Option<usize> {
    let total: f64 = chances.iter().sum();
    let mut sum = 0.0;
    let passed = chances.iter().position(|chance| {
        sum += chance;
        *chance > 0.0 && sum > share * total
    });
    passed.or_else(|| chances.iter().rposition(|chance| *chance > 0.0))
}

/// A number in [0, 1) that only depends on the arguments (splitmix64 of their mixture).
fn uniform(seed: u64, restart: u64, step: u64) -> f64 {
    let mut x = seed;
    for word in [restart, step] {
        x = x.wrapping_add(word).wrapping_add(0x9E37_79B9_7F4A_7C15);
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^= x >> 31;
    }
    (x >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Points in the plane by their angles.
    fn gram(angles: &[f64]) -> Vec<f64> {
        angles.iter().flat_map(|a| angles.iter().map(move |b| (a - b).cos())).collect()
    }

    fn labels(linkage: Linkage, k: usize, angles: &[f64]) -> Vec<usize> {
        let clusters = Clusters {
            cluster: k,
            linkage,
            seed: 42,
            across: Share::Equal,
            within: Share::Equal,
            performance: None,
        };
        clusters.labels(&normalized(&gram(angles), angles.len()), angles.len())
    }

    #[test]
    fn both_ways_find_what_lies_together() {
        for linkage in [Linkage::KMeans, Linkage::Ward] {
            assert_eq!(labels(linkage, 2, &[0.0, 2.0, 0.1, 2.1, 0.2]), [0, 1, 0, 1, 0]);
            assert_eq!(labels(linkage, 3, &[0.0, 2.0, 0.1, 4.0, 2.1, 4.1]), [0, 1, 0, 2, 1, 2]);
            assert_eq!(labels(linkage, 1, &[0.0, 2.0, 4.0]), [0, 0, 0]);
            assert_eq!(labels(linkage, 3, &[0.0, 2.0, 4.0]), [0, 1, 2]);
        }
    }

    #[test]
    fn equal_points_and_zero_vectors_are_no_trouble() {
        for linkage in [Linkage::KMeans, Linkage::Ward] {
            assert_eq!(labels(linkage, 2, &[1.0]), [0]);
            let found = labels(linkage, 2, &[1.0; 4]);
            assert!(found.contains(&0) && found.iter().all(|label| *label < 2));
        }
        assert_eq!(normalized(&[0.0, 0.0, 0.0, 4.0], 2), [0.0, 0.0, 0.0, 1.0]);
    }

    #[test]
    fn random_numbers_are_spread_over_the_unit_interval() {
        let drawn: Vec<f64> = (0..1000).map(|step| uniform(42, 3, step)).collect();
        let mean = drawn.iter().sum::<f64>() / 1000.0;
        assert!(drawn.iter().all(|x| (0.0..1.0).contains(x)) && (mean - 0.5).abs() < 0.05, "{mean}");
        assert_eq!(draw(&[0.0, 0.0], 0.3), None);
        assert_eq!(draw(&[0.0, 1.0, 1.0], 0.0), Some(1));
        assert_eq!(draw(&[1.0, 1.0, 0.0], 0.999_999), Some(1));
    }
}
