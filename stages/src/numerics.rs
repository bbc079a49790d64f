//! The numerics class: which instruction set matrix products and ONNX Runtime were computed with.
//!
//! Element-wise kernels are exact on every instruction set; sums of products are not, because wider units add in another order. Stages
//! whose numbers depend on it put the class in their key, so that machines that compute alike share a cache and others do not.

/// Names the class of this machine, by the levels of the x86-64 psABI.
pub fn numerics_class() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        let has_v3 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("bmi2");
        let has_v4 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512cd")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        if has_v3 && has_v4 {
            "x86-64-v4"
        } else if has_v3 {
            "x86-64-v3"
        } else {
            "x86-64-v2"
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        std::env::consts::ARCH
    }
}
