"""What the tests of both norms share: inputs whose results are exact."""

from __future__ import annotations

import pytest
import torch

from mot_kernels.testing import ROUTES, Route

# Too small to change a mean square, but not 0: an unused lane must not divide by it.
NO_EPS = 2.0**-80

ALTERNATING = Route("alternating", 2, ((0, 1), (1, 1)) * 20)

all_routes = pytest.mark.parametrize("route", ROUTES.values(), ids=str)
some_routes = pytest.mark.parametrize("name", ["scattered", "one_branch", "one_row", "no_rows"])


def powers(*shape: int) -> torch.Tensor:
    """+-2^j, one j for each vector of the last dimension."""
    signs = torch.randint(0, 2, shape) * 2.0 - 1.0
    return signs * 2.0 ** torch.randint(-1, 3, (*shape[:-1], 1))


def labels_of(route: Route, device: torch.device) -> torch.Tensor:
    return torch.tensor(route.labels, dtype=torch.int64, device=device)
