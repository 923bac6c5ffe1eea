"""Law 3 for every published family: a layout computes what one process computes, in float64.

Log-probs, entropies, the gradient norm and the weights after a step. One process is compared with
transformers in tests/unit/test_families.py.

Faults that were put in one by one and made a test here fail:
  rope      the layers without rope counted from the first of a stage
  heads     squares of q and k summed over no rank, or their gradient summed over no rank; a rank's
            share of the heads counted as all
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import dataset_of
from launch import launch
from published import PUBLISHED, published_folder

from data.trees import make_batch
from optimizer import AdamW
from parallel import init_mesh
from pipeline import pipeline
from weights.folder import load_model, to_theirs

NEAR = 1e-10
TREES = [([5, 6, 7, 8, 9], [[11, 12, 13], [14, 15, 16, 17, 18, 19]]), ([3], [[21], [99, 2, 60]])]


def one_step(folder: Path, tp: int, cp: int, pp: int) -> tuple[list, dict]:
    """Take a step; return log-probs, entropies and gradient norm, and the weights of this stage."""
    model = load_model(folder, torch.float64, mesh=init_mesh(tp, cp, pp, device="cpu"))
    batch = make_batch(dataset_of(TREES), [0, 1])
    # A bias of k on components without rope moves no score: its gradient is rounding, which AdamW
    # with a usual eps would take for a direction.
    optimizer = AdamW(model, (0.9, 0.95), 1e-4, 0.0)
    numbers = torch.zeros(0)
    for _, hidden in pipeline(model, [batch], optimizer):
        if not model.mesh.last_stage:
            continue
        logps, entropy = model.logps(hidden, batch, temperature=0.7, entropy=True)
        weight = torch.arange(len(logps)) / len(logps)
        (weight * logps + (1 - weight) * entropy).sum().backward()
        numbers = torch.cat((logps, entropy)).detach()
    norm, _ = optimizer.step(1e-2, 0.0)
    numbers = torch.cat((numbers, torch.tensor([float(norm)], dtype=torch.float64)))
    return numbers.tolist(), {name: w.numpy() for name, w in to_theirs(model).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_does_not_depend_on_the_layout(name: str, tmp_path: Path):
    """tp2, tp2 cp2 and pp2: numbers and weights after a step are within 1e-10 of one process."""
    folder = published_folder(name, tmp_path / "model")
    ((alone, weights),) = launch(1, one_step, folder, 1, 1, 1)
    for layout in ((2, 1, 1), (2, 2, 1), (1, 1, 2)):
        ranks = launch(math.prod(layout), one_step, folder, *layout)
        for numbers, mine in ranks:
            # A stage that is not the last has no log-probs, only the norm.
            assert np.allclose(numbers, alone[-len(numbers) :], rtol=0, atol=NEAR)
            assert all(np.allclose(w, weights[n], rtol=0, atol=NEAR) for n, w in mine.items())
        assert {n for _, mine in ranks for n in mine} == set(weights)
