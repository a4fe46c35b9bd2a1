"""The keys of DeePMD-kit's input that are not ours: those that we lack, and those that change nothing.

From deepmd/utils/argcheck.py of DeePMD-kit 3.2; changes with its releases.
"""

# Keys that ask for something we do not have, and what there is instead. They are accepted while they are off: 0, false,
# null or empty.
LACKING = {
    f"{section}/{name}".lstrip("/"): instead
    for section, names, instead in (
        ("", "loss_dict", "one model is trained at a time"),
        ("", "validating", "validation is training/validation_data"),
        ("", "nvnmd", "there is no NVNMD hardware model"),
        ("model", "model_dict shared_dict", "one model is trained at a time"),
        ("model", "bridging_method", "there is no bridging to a short-range potential"),
        ("model", "use_srtab", "there is no tabulated short-range energy"),
        ("model", "pair_exclude_types", "every pair of elements within rcut interacts"),
        ("model", "atom_exclude_types", "every atom has an energy"),
        ("model", "preset_out_bias", "the energy of each element comes from the training data"),
        ("model", "type_embedding", "se_e2_a has a net per element instead of a type embedding"),
        ("model", "modifier", "the energy is the fitting net's alone"),
        ("model", "compress", "models are not compressed"),
        ("model", "spin", "atoms have no spin"),
        ("model", "finetune_head", "training begins with random weights or with `--init-model`"),
        ("model/descriptor", "exclude_types", "every pair of elements within rcut interacts"),
        ("model/descriptor", "env_protection", "the environment matrix is not shifted"),
        (
            "model/fitting_net",
            "numb_fparam numb_aparam default_fparam use_aparam_as_mask dim_case_embd",
            "the fitting net takes the descriptor alone",
        ),
        ("model/fitting_net", "atom_ener", "the energy of each element comes from the training data"),
        ("model/fitting_net", "layer_name", "every element has layers of its own"),
        ("learning_rate", "stop_lr_ratio", "the schedule ends at stop_lr"),
        ("learning_rate", "warmup_steps warmup_ratio", "the schedule begins at start_lr"),
        ("learning_rate", "smooth", "the rate changes every decay_steps"),
        (
            "loss",
            "start_pref_h limit_pref_h start_pref_ae limit_pref_ae start_pref_pf limit_pref_pf start_pref_gf "
            "limit_pref_gf use_default_pf numb_generalized_coord enable_atom_ener_coeff",
            "the loss has terms for energy, force and virial",
        ),
        ("loss", "relative_f use_huber f_use_norm", "the loss is a mean squared error"),
        ("loss", "intensive_ener_virial", "squared energy errors are divided by the number of atoms once"),
        ("training", "data_dict model_prob num_epoch_dict", "one model is trained at a time"),
        ("training", "mixed_precision", "the precision is model/descriptor/precision"),
        ("training", "save_dir", "checkpoints go to save_ckpt, which may hold a folder"),
        ("training", "enable_ema", "the weights are not averaged"),
        ("training", "change_bias_after_training", "the energy bias stays as trained"),
        ("training", "profiling enable_profiler", "a profiler is run from outside"),
        ("training", "tensorboard", "the learning curve is written to disp_file"),
        ("training", "gradient_max_norm", "gradients are not clipped"),
        ("training", "zero_stage", "the Kalman filter shards its covariance by itself"),
        ("training", "enable_compile", "kernels are compiled at installation"),
        ("training", "warmup_steps warmup_ratio", "the schedule begins at start_lr"),
    )
    for name in names.split()
}

# Keys that change nothing in the model that results.
IGNORED = {
    f"{section}/{name}"
    for section, names in (
        ("model", "data_stat_nbatch data_stat_protect data_bias_nsample info model_branch_alias"),
        ("model", "smin_alpha sw_rmin sw_rmax srtab_add_bias"),  # without effect if use_srtab is absent
        ("model", "bridging_r_inner bridging_r_outer"),  # without effect if there is no bridging_method
        ("model/fitting_net", "rcond"),
        ("learning_rate", "scale_by_worker warmup_start_factor"),
        ("loss", "huber_delta"),  # without effect if use_huber is off
        ("training", "stat_file stat_file_mode numb_test disp_avg acc_freq neighbor_graph_method warmup_start_factor"),
        ("training", "disp_training time_training"),
        ("training", "enable_tf32"),  # of GPUs
        ("training", "load_ckpt"),  # of DeePMD-kit 1.x, which restarts by an option of the command, as we do
        ("training", "max_ckpt_keep ckpt_keep_ratio ema_decay ema_ckpt_keep"),
        ("training", "profiling_file tensorboard_log_dir tensorboard_freq"),
    )
    for name in names.split()
}
