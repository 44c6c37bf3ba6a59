"""Configurations name the field, the value and the remedy."""

import dataclasses
import json

import pytest

from configs import CONFIGS
from gqe_jax.config import (
    AttentionConfig,
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RopeScaling,
    RunConfig,
)
from gqe_jax.config_json import differences, from_dict, to_dict


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (AttentionConfig, {"variant": "moe"}, "variant is 'moe'; it must be one of gqe, hard_c"),
        (
            AttentionConfig,
            {"variant": "weighted_concat", "straight_through": True},
            "straight_through is True; the slots of weighted_concat are weighted",
        ),
        (AttentionConfig, {"expert_init_spread": 1.5}, "expert_init_spread is 1.5; .* 0 and 1"),
        (
            AttentionConfig,
            {"variant": "gqa", "selection_bias": True},
            "selection_bias is True; gqa selects no experts",
        ),
        (AttentionConfig, {"extra_slot_scale": -1.0}, "extra_slot_scale is -1.0; .* 0 and 1"),
        (
            RunConfig,
            {
                "model": ModelConfig(attention=AttentionConfig(variant="gqa")),
                "optimizer": OptimizerConfig(tied_fraction=0.5),
            },
            "optimizer.tied_fraction is 0.5; variant gqa has no experts",
        ),
        (AttentionConfig, {"top_k": 3}, "top_k is 3; a group has 2 experts.*at most that"),
        (AttentionConfig, {"top_k": 0}, "top_k is 0; it must be positive"),
        (AttentionConfig, {"num_kv_heads": 3}, "num_query_experts is 16.*multiple of num_kv_h"),
        (AttentionConfig, {"embed_dim": 1000}, r"embed_dim is 1000.*num_query_experts \(16\)"),
        (AttentionConfig, {"head_dim": 7}, "head_dim is 7; rotary.*even"),
        (AttentionConfig, {"embed_dim": 48}, "head_dim is 3; rotary.*even"),
        (AttentionConfig, {"qk_norm_epsilon": 0.0}, "qk_norm_epsilon is 0.0"),
        (RopeScaling, {"kind": "yarn"}, "kind is 'yarn'; it must be one of none, linear, llama3"),
        (RopeScaling, {"high_freq_factor": 1.0}, "high_freq_factor is 1.0; .*low_freq_factor"),
        (AttentionConfig, {"shared_kv": "max"}, "shared_kv is 'max'; it must be one of mean"),
        (ModelConfig, {"num_layers": 0}, "num_layers is 0"),
        (ModelConfig, {"dtype": "float16"}, "dtype is 'float16'; it must be one of float32"),
        (ModelConfig, {"remat": "all"}, "remat is 'all'; it must be one of keep_everything"),
        (DataConfig, {"corpus": ""}, "corpus is ''"),
        (OptimizerConfig, {"warmup_fraction": 0.9}, "warmup_fraction is 0.9; with decay_fraction"),
        (OptimizerConfig, {"final_learning_rate": 1.0}, "final_learning_rate is 1.0"),
        (OptimizerConfig, {"beta2": 1.0}, "beta2 is 1.0"),
        (OptimizerConfig, {"weight_decay": -0.1}, "weight_decay is -0.1"),
        (MeshConfig, {"fsdp": 0}, "fsdp is 0; it must be positive, or -1"),
        (MeshConfig, {"data": -1, "tensor": -1}, "data, tensor is -1; at most one"),
        (RunConfig, {"steps": 0}, "steps is 0"),
        (RunConfig, {"seed": 2**63}, "seed is 9223372036854775808; it must be between 0 and"),
        (RunConfig, {"resume_step": -1}, "resume_step is -1"),
        (OptimizerConfig, {"schedule_steps": 0}, "schedule_steps is 0"),
        (RunConfig, {"run_dir": ""}, "run_dir is ''"),
        (RunConfig, {"batch_size": 6, "accumulation_steps": 4}, "batch_size is 6.*multiple of"),
        (RunConfig, {"eval_batches": 0}, "eval_batches is 0"),
        (RunConfig, {"attention_kernel": "flash"}, "attention_kernel is 'flash'.*one of reference"),
    ],
)
def test_bad_values_are_named(kind, fields, message):
    with pytest.raises(ConfigError, match=message):
        kind(**fields)


@pytest.mark.parametrize(
    ("sizes", "devices", "message"),
    [
        ({"data": 3}, 2, "needs 3 devices and there are 2"),
        ({"data": 2}, 8, "uses 2 of 8 devices: set one axis to -1"),
        ({"data": -1, "tensor": 3}, 8, "mesh.data.*take 3 devices, which does not divide 8"),
    ],
)
def test_a_mesh_that_does_not_fit_is_named(sizes, devices, message):
    with pytest.raises(ConfigError, match=message):
        MeshConfig(**sizes).resolve(devices)


def test_mesh_fills_up():
    assert MeshConfig(data=-1, tensor=2).resolve(8) == {
        "data": 4,
        "fsdp": 1,
        "context": 1,
        "tensor": 2,
    }


def test_head_dim_follows_embed_dim_unless_given():
    config = AttentionConfig()
    assert config.resolved_head_dim == 64
    assert dataclasses.replace(config, embed_dim=512).resolved_head_dim == 32
    assert dataclasses.replace(config, head_dim=128).resolved_head_dim == 128


@pytest.mark.parametrize(
    ("variant", "slots", "active"),
    [("gqe", 10, 9), ("hard_concat", 8, 8), ("weighted_concat", 8, 8), ("gqa", 16, 16)],
)
def test_slots_and_active_heads_of_the_main_setting(variant, slots, active):
    config = AttentionConfig(variant=variant)
    assert (config.num_slots, config.num_active_heads) == (slots, active)


@pytest.mark.parametrize("name", CONFIGS)
def test_named_configurations_survive_json(name):
    config = CONFIGS[name]
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_the_250m_configurations_differ_only_in_the_variant():
    base = CONFIGS["gqe_250m"]
    for name in ("gqa_250m", "hard_concat_250m", "weighted_concat_250m"):
        assert set(differences(CONFIGS[name], base)) == {"model.attention.variant"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 3}, "stepz is no field of RunConfig; it has model"),
        ({"steps": "many"}, "steps is 'many'; it must be of type int"),
        ({"model": {"attention": {"top_k": 1.5}}}, "model.attention.top_k is 1.5"),
        ({"model": 3}, "model. is 3; it must be an object"),
        ({"steps": True}, "steps is True; it must be of type int"),
    ],
)
def test_damaged_json_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(RunConfig, change)


def test_an_int_serves_as_a_float_and_none_where_allowed():
    config = from_dict(RunConfig, {"optimizer": {"clip_cap": 2}, "eval_batches": None})
    assert config.optimizer.clip_cap == 2.0
    assert config.eval_batches is None


def test_a_configuration_of_before_a_field_was_added_has_its_default():
    saved = to_dict(CONFIGS["tiny"])
    for name in ("rope_scaling", "qk_norm", "qk_norm_epsilon"):
        del saved["model"]["attention"][name]
    del saved["model"]["tied_embedding"]
    assert from_dict(RunConfig, saved) == CONFIGS["tiny"]


def test_only_what_past_steps_depend_on_counts_as_different():
    ours = RunConfig(steps=5, log_every=3, data=DataConfig(prefetch=2), mesh=MeshConfig(tensor=2))
    assert differences(ours, RunConfig()) == {}
    assert differences(RunConfig(seed=1), RunConfig()) == {"seed": (1, 0)}
