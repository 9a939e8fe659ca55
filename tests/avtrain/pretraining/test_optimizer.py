"""Which parameters pretraining's optimiser lets decay."""

from torch import nn

from avtrain.config import read_config
from avtrain.models.avbert import AVBert
from avtrain.pretraining.objectives import Objectives
from avtrain.pretraining.optimizer import parameter_groups


def test_no_weight_decay_on_norms_and_biases_and_no_parameter_twice():
    network = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv2d(1, 2, 3))
    decayed, free = parameter_groups({"a": network, "b": network[0]}, 0.1)
    assert [parameter.dim() for parameter in decayed["params"]] == [2, 4] and decayed["weight_decay"] == 0.1
    assert len(free["params"]) == 4 and free["weight_decay"] == 0.0


def test_what_of_the_real_model_decays():
    config = read_config("tiny")
    modules = {"model": AVBert(config.model), "objectives": Objectives(config.model, config.objectives)}
    names = {id(parameter): f"{prefix}.{name}" for prefix, module in modules.items()
             for name, parameter in module.named_parameters()}
    decayed, free = ([names[id(parameter)] for parameter in group["params"]]
                     for group in parameter_groups(modules, 0.1))
    assert sorted(decayed + free) == sorted(names.values())
    vectors = {"model.bos", "model.modality", "objectives.mask", *(
        f"model.{name}_embedding.positions" for name in ("visual", "audio", "multimodal"))}
    norms = {names[id(parameter)] for module in modules.values() for part in module.modules()
             if isinstance(part, (nn.LayerNorm, nn.BatchNorm2d, nn.BatchNorm3d)) for parameter in part.parameters()}
    assert len(norms) > 50 and set(free) == vectors | norms | {name for name in names.values()
                                                               if name.endswith(".bias")}
    for name in ("visual_cnn.stem.0.weight", "visual_projection.weight", "encoder.stacks.0.0.attention_in.shared",
                 "encoder.stacks.0.0.attention_in.private", "encoder.stacks.0.0.attention_in.skew"):
        assert f"model.{name}" in decayed
