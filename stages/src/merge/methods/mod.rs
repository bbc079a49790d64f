//! The merge methods, a file each, and their registry.

mod actmat;
mod adamerging;
mod average;
mod breadcrumbs;
mod consensus;
mod dare;
mod della;
mod emr;
mod fisher;
mod iso_c;
mod iso_cts;
mod karcher;
mod knots;
mod lines;
mod model_stock;
mod pcb;
mod regmean;
mod sce;
mod slerp;
pub(super) mod svc;
mod svd_hybrid;
mod tact;
mod tall;
pub(super) mod task_arithmetic;
mod ties;
mod tsv_c;
mod tsv_m;
mod wudi;

pub use adamerging::{ADAPTATION, Adaptation, TunedTensor};

use super::method::Method;

/// All methods, in the order in which they are listed.
pub(super) const METHODS: &[&dyn Method] = &[
    &average::Average,
    &task_arithmetic::TaskArithmetic,
    &tsv_m::TsvM,
    &tsv_c::TsvC,
    &iso_c::IsoC,
    &iso_cts::IsoCts,
    &knots::Knots,
    &actmat::Actmat,
    &tact::Tact,
    &wudi::Wudi,
    &regmean::RegMean,
    &fisher::Fisher,
    &adamerging::AdaMerging,
    &svc::Svc,
    &ties::Ties,
    &dare::Dare,
    &della::Della,
    &breadcrumbs::Breadcrumbs,
    &lines::Lines,
    &pcb::Pcb,
    &sce::Sce,
    &model_stock::ModelStock,
    &slerp::Slerp,
    &karcher::Karcher,
    &consensus::Consensus,
    &tall::Tall,
    &emr::Emr,
    &svd_hybrid::SvdHybrid,
];
