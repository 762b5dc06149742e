"""Which keys DeepSpeed's configuration knows, as data: light code must not import DeepSpeed to check a recipe.

tests/train/test_deepspeed_config.py compares every list with the installed DeepSpeed, so that it cannot drift.
"""

from __future__ import annotations

from collections.abc import Mapping

Tree = Mapping[str, "Tree | None"]
"""Key -> the keys below it, or None where any value may stand."""

_OFFLOAD_PARAM: Tree = dict.fromkeys(("device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"))
_OFFLOAD_OPTIMIZER: Tree = dict.fromkeys(
    (
        "device",
        "nvme_path",
        "buffer_count",
        "pin_memory",
        "pipeline_read",
        "pipeline_write",
        "fast_init",
        "ratio",
        "super_offload",
        "cpuadam_cores_perc",
    )
)
_ZERO: Tree = {
    **dict.fromkeys(
        (
            "stage",
            "contiguous_gradients",
            "reduce_scatter",
            "reduce_bucket_size",
            "use_multi_rank_bucket_allreduce",
            "allgather_partitions",
            "allgather_bucket_size",
            "overlap_comm",
            "compute_grad_norm",
            "load_from_fp32_weights",
            "sub_group_size",
            "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold",
            "stage3_model_persistence_threshold",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_gather_16bit_weights_on_model_save",
            "stage3_module_granularity_threshold",
            "stage3_use_all_reduce_for_fetch_params",
            "stage3_allgather_sequential",
            "ignore_unused_parameters",
            "round_robin_gradients",
            "parameter_alignment",
            "zero_hpz_partition_size",
            "zero_quantized_weights",
            "zero_quantized_nontrainable_weights",
            "zero_quantized_gradients",
            "memory_efficient_linear",
            "pipeline_loading_checkpoint",
            "override_module_apply",
            "log_trace_cache_warnings",
            "enable_sanity_checks",
        )
    ),
    "offload_param": _OFFLOAD_PARAM,
    "offload_optimizer": _OFFLOAD_OPTIMIZER,
}
KNOWN: Tree = {
    **dict.fromkeys(
        (
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "gradient_clipping",
            "prescale_gradients",
            "gradient_predivide_factor",
            "communication_data_type",
            "seq_parallel_communication_data_type",
            "zero_allow_untested_optimizer",
            "zero_force_ds_cpu_optimizer",
            "optimizer",
            "scheduler",
            "steps_per_print",
            "wall_clock_breakdown",
            "memory_breakdown",
            "dump_state",
            "disable_python_gc",
            "disable_allgather",
            "dataloader_drop_last",
        )
    ),
    "zero_optimization": _ZERO,
    "bf16": dict.fromkeys(
        (
            "enabled",
            "immediate_grad_update",
            "check_grad_overflow",
            "bf16_master_weights_and_grads",
            "bf16_optimizer_states",
        )
    ),
    "fp16": dict.fromkeys(
        (
            "enabled",
            "auto_cast",
            "loss_scale",
            "initial_scale_power",
            "loss_scale_window",
            "hysteresis",
            "consecutive_hysteresis",
            "min_loss_scale",
            "fp16_master_weights_and_grads",
        )
    ),
    "data_types": dict.fromkeys(("grad_accum_dtype",)),
    "activation_checkpointing": dict.fromkeys(
        (
            "partition_activations",
            "number_checkpoints",
            "contiguous_memory_optimization",
            "synchronize_checkpoint_boundary",
            "cpu_checkpointing",
            "profile",
        )
    ),
    "aio": dict.fromkeys(
        ("block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds")
    ),
    "checkpoint": dict.fromkeys(("tag_validation", "load_universal", "use_node_local_storage")),
    "comms_logger": dict.fromkeys(("enabled", "prof_all", "prof_ops", "verbose", "debug")),
    "flops_profiler": dict.fromkeys(
        (
            "enabled",
            "recompute_fwd_factor",
            "profile_step",
            "module_depth",
            "top_modules",
            "detailed",
            "output_file",
        )
    ),
}

OWNED: Mapping[str, str] = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.per_device_train_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size (accumulation follows from it)",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.optim",
    "scheduler": "train.lr_scheduler_type",
    "zero_optimization.stage": "deepspeed.stage",
    "zero_optimization.offload_optimizer.device": "deepspeed.offload_optimizer",
    "zero_optimization.offload_param.device": "deepspeed.offload_param",
    "bf16.enabled": "train.precision",
    "fp16.enabled": "train.precision",
}
"""Keys that a recipe field decides: an override beside it would contradict the plan."""
