"""The Gaussian kernel of the maximum mean discrepancy, and its width (Gretton et al. 2012, JMLR 13).

Shapes: N rows of one set, M of the other, D dimensions.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import pdist

Array = NDArray[np.floating]


def gaussian(x_ND: Array, y_MD: Array, bandwidth: float) -> NDArray[np.float32]:
    """exp(-|x - y|^2 / 2 w^2), [N, M]."""
    x_ND, y_MD = x_ND.astype(np.float64), y_MD.astype(np.float64)
    squares_NM = (x_ND**2).sum(1)[:, None] + (y_MD**2).sum(1) - 2 * x_ND @ y_MD.T
    return np.exp(np.maximum(squares_NM, 0) / (-2 * bandwidth**2)).astype(np.float32)


def median_distance(rows_ND: Array) -> float:
    """Of all pairs; 1 where more than half of them are equal, for any width tells those from the others."""
    return float(np.median(pdist(rows_ND.astype(np.float64)))) or 1.0
