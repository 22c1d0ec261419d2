"""What a linear is for comes from structure, for every family and without its names."""

import pytest
from tiny_models import FAMILIES, tiny_llama

from nanoquant.architectures import find_decoder, linear_shape
from nanoquant.roles import block_roles, layer_places

LLAMA = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}
LLAMA |= {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
EXPECTED = dict.fromkeys(("llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral"), LLAMA) | {
    "phi": {"q_proj": "q", "k_proj": "k", "v_proj": "v", "dense": "o", "fc1": "up", "fc2": "down"},
    "phi3": {
        "qkv_proj": "q+k+v",
        "o_proj": "o",
        "gate_up_proj": "gate+up",
        "down_proj": "down",
    },
    "opt": {
        "q_proj": "q",
        "k_proj": "k",
        "v_proj": "v",
        "out_proj": "o",
        "fc1": "up",
        "fc2": "down",
    },
    "gpt2": {
        "attn.c_attn": "q+k+v",
        "attn.c_proj": "o",
        "mlp.c_fc": "up",
        "mlp.c_proj": "down",
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_every_family_has_its_role(family):
    decoder = find_decoder(FAMILIES[family]())
    places = layer_places(decoder, range(len(decoder.blocks)))
    assert places.keys() == decoder.linear_modules().keys()
    for name, place in places.items():
        known = [role for end, role in EXPECTED[family].items() if name.endswith(f".{end}")]
        assert [place.role] == known, name


def test_depth_runs_from_0_to_1_over_the_model_and_not_over_the_chosen_blocks():
    decoder = find_decoder(tiny_llama(layers=5))
    places = layer_places(decoder, range(1, 3))
    assert {place.depth for place in places.values()} == {0.25, 0.5}
    single = find_decoder(tiny_llama(layers=1))
    assert {place.depth for place in layer_places(single, range(1)).values()} == {0.5}


def test_shapes_of_conv1d_are_those_of_the_linear_it_stands_for():
    decoder = find_decoder(FAMILIES["gpt2"]())
    assert linear_shape(decoder.blocks[0].mlp.c_fc) == (96, 64)
    assert linear_shape(find_decoder(tiny_llama()).blocks[0].mlp.up_proj) == (96, 64)


@pytest.mark.parametrize(
    ("groups", "widths", "roles"),
    [
        ("q,kv o up down", "64x64 32x64 64x64 96x64 64x96", "q k+v o up down"),
        ("q o gate,up down", "64x64 64x64 96x64 96x64 64x96", "q o gate up down"),
        ("a,b c d e f", "48x64 72x64 96x48 64x64 96x64 64x96", "    up down"),
        ("a,b,c,d o up down", "64x64 64x64 64x64 64x64 64x64 96x64 64x96", "     up down"),
        ("up down", "96x64 64x96", "up down"),
        ("a b c", "10x64 20x64 30x64", "  "),
        ("only", "64x64", ""),
    ],
    ids=["fused_kv", "shared_kv", "compressed", "four", "mlp_alone", "odd", "one"],
)
def test_roles_follow_widths_and_are_empty_where_these_do_not_tell(groups, widths, roles):
    groups = [group.split(",") for group in groups.split(" ")]
    order = [name for group in groups for name in group]
    shapes = {n: tuple(map(int, w.split("x"))) for n, w in zip(order, widths.split(), strict=True)}
    assert list(block_roles(order, groups, shapes).values()) == roles.split(" ")
