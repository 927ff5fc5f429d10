"""How far one set of rows is from another: maximum mean discrepancy, and total variation over clusters.

Shapes: N rows of one set, M of the other, D dimensions, C clusters.
"""

import numpy as np
from numpy.typing import NDArray

from data_builders.gaussian_kernel import Array, gaussian


def total_variation(counts_C: NDArray[np.integer] | Array, others_C: NDArray[np.integer] | Array) -> float:
    """Half the sum of the differences of the shares: what part of one set would have to change clusters. 0 to 1."""
    return float(np.abs(counts_C / counts_C.sum() - others_C / others_C.sum()).sum() / 2)


def squared_mmd(x_ND: Array, y_MD: Array, bandwidth: float) -> float:
    """The unbiased estimate of MMD^2 with the kernel exp(-|a - b|^2 / 2 w^2): Gretton et al. 2012, JMLR 13, equation 3.

    It may be below 0, where the sets are nearer than two samples of one distribution are on average.
    """
    n, m = len(x_ND), len(y_MD)
    within_x = (_kernel_sum(x_ND, x_ND, bandwidth) - n) / (n * (n - 1))
    within_y = (_kernel_sum(y_MD, y_MD, bandwidth) - m) / (m * (m - 1))
    return within_x + within_y - 2 * _kernel_sum(x_ND, y_MD, bandwidth) / (n * m)


def _kernel_sum(x_ND: Array, y_MD: Array, bandwidth: float) -> float:
    return float(gaussian(x_ND, y_MD, bandwidth).sum(dtype=np.float64))
