"""Rotary positions of a config.json: their base, their share of a head, how they are stretched."""

import math
from typing import NamedTuple

from rotary import Divisors, Linear, Llama3, Scaling, Yarn
from weights import families
from weights.options import Options, agreed, translate


class Rope(NamedTuple):
    """Options of the rotary positions."""

    theta: float
    scaling: Scaling | None
    share: float  # part of every head that is rotated
    local_theta: float  # base of the layers with a window; 0 = that of all layers
    query_growth: tuple[float, int] | None  # of GPTConfig
    longest: int  # positions after which the rope is another one; 0 = never


# Kind of rope -> keys that it needs, keys that it may have.
ORIGINAL = "original_max_position_embeddings"
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL)
YARN = ("factor", ORIGINAL)
YARN_MORE = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
ROPES = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (LLAMA3, ()),
    "yarn": (YARN, YARN_MORE),
    "dynamic": (("factor",), ("original_max_position_embeddings",)),
    "longrope": (("short_factor", "long_factor"), ("factor", "attention_factor", ORIGINAL)),
}


def read_rope(options: Options, family: str, raw: dict) -> Rope:
    """Read the rotary options: rope_parameters of transformers 5, or the older separate keys.

    raw: the whole config.json.
    """
    new = dict(options.take("rope_parameters") or {})
    local: dict = {}
    split = "sliding_attention" in new
    if family in families.LOCAL_ROPE:  # one set of keys a kind of layer
        local = dict(new.pop("sliding_attention", None) or {})
        new = new | dict(new.pop("full_attention", None) or {})
    old = dict(options.take("rope_scaling") or {})
    for name in old.keys() & new.keys():
        agreed({f"rope_scaling.{name}": old[name], f"rope_parameters.{name}": new[name]})
    rope = old | new
    theta = agreed(
        {
            "rope_parameters.rope_theta": rope.pop("rope_theta", None),
            "rope_theta": options.take("rope_theta"),
            "rotary_emb_base": options.take("rotary_emb_base"),
        }
    )
    share = agreed(
        {
            "rope_parameters.partial_rotary_factor": rope.pop("partial_rotary_factor", None),
            "partial_rotary_factor": options.take("partial_rotary_factor"),
            "rotary_pct": options.take("rotary_pct"),
        }
    )
    if family not in families.SHARE and share not in (None, 1):
        raise ValueError(
            f"config.json: partial_rotary_factor = {share} is not read by the code of {family} "
            "models: remove it if the model was trained without it"
        )
    share = share or families.SHARE.get(family, 1.0)
    theta = theta or families.THETA.get(family, 10000.0)
    kind = agreed({"rope_type": rope.pop("rope_type", None), "type": rope.pop("type", None)})
    kind = kind or "default"
    local_theta = 0.0
    if family in families.LOCAL_ROPE:
        before = options.take("rope_local_base_freq") if family == "gemma3_text" else None
        given = agreed(
            {"sliding_attention.rope_theta": local.pop("rope_theta", None)}
            | {"rope_local_base_freq": before}
        )
        local_theta = float(given or families.LOCAL_ROPE[family])
        if family == "olmo3" and not split and theta != local_theta:
            raise ValueError(
                f"config.json: rope_theta = {theta} is read in two ways for the layers of an olmo3 "
                "model that have a window: write rope_parameters with full_attention and "
                "sliding_attention, a rope_theta each"
            )
        if _scaling(local.pop("rope_type", None) or "default", local):
            raise ValueError("config.json: rope_parameters.sliding_attention may not be stretched")
    limit = raw.get("max_position_embeddings", 2048)
    longest = 0
    if kind == "dynamic":  # a longer row has a larger base, for all its positions
        longest = limit
    growth = None
    if family == "ministral3":
        if kind == "default":
            raise ValueError("config.json of a ministral3 model needs rope_parameters")
        rope.pop("max_position_embeddings", None)
        beta = rope.pop("llama_4_scaling_beta", None)
        growth = (beta, rope.get(ORIGINAL) or limit) if beta else None
    if family == "phi3":
        kind = {"su": "longrope", "yarn": "longrope"}.get(kind, kind)
        rope.setdefault(ORIGINAL, options.take(ORIGINAL, 4096))
    if kind == "longrope":  # a longer row has the long factors, for all its positions
        longest = agreed({ORIGINAL: rope.get(ORIGINAL), "before": options.take(ORIGINAL)}) or limit
        rope |= {ORIGINAL: longest}
        rope["factor"] = rope.get("factor") or limit / longest
    elif family == "phi3":
        del rope[ORIGINAL]
    return Rope(float(theta), _scaling(kind, rope), share, local_theta, growth, longest)


def _scaling(kind: str, rope: dict) -> Scaling | None:
    """Build the stretching of a kind of rope from its keys. ValueError: they do not fit."""
    keys, more = translate("rope_type", kind, ROPES)
    if missing := [key for key in keys if rope.get(key) is None]:
        raise ValueError(f"config.json: rope_type {kind} needs {missing[0]}")
    if unknown := sorted(set(rope) - {*keys, *more}):
        raise ValueError(f"config.json: plumb does not know {unknown[0]} for rope_type {kind}")
    if kind == "linear":
        return Linear(rope["factor"])
    if kind == "llama3":
        return Llama3(*(rope[key] for key in keys))
    if kind == "yarn":
        return _yarn(rope)
    if kind == "longrope":
        return _longrope(rope)
    return None


def _longrope(rope: dict) -> Divisors:
    """Build LongRoPE's short factors, and its amplitude where its keys do not give it."""
    if (amplitude := rope.get("attention_factor")) is None:
        stretched = math.log(max(rope["factor"], 1.0)) / math.log(rope[ORIGINAL])
        amplitude = math.sqrt(1 + stretched)
    factors = rope["short_factor"]
    if not all(type(factor) in (int, float) and factor > 0 for factor in factors):
        raise ValueError("config.json: short_factor must hold numbers above 0")
    return Divisors(tuple(factors), amplitude)


def _yarn(rope: dict) -> Yarn:
    """Build YaRN from its keys; where they do not give the amplitude it follows from the factor."""

    def sharpness(scale: float) -> float:
        return 1.0 if rope["factor"] <= 1 else 0.1 * scale * math.log(rope["factor"]) + 1.0

    own, whole = rope.get("mscale"), rope.get("mscale_all_dim")
    amplitude = rope.get("attention_factor")
    if amplitude is None:
        amplitude = sharpness(own) / sharpness(whole) if own and whole else sharpness(1.0)
    return Yarn(
        rope["factor"],
        rope["original_max_position_embeddings"],
        rope.get("beta_fast") or 32.0,
        rope.get("beta_slow") or 1.0,
        rope.get("truncate", True) is not False,
        amplitude,
    )
