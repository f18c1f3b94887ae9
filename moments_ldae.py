"""The mean, the covariance and the principal components of vectors that are seen a batch at a time."""

import torch
import torch.distributed as dist

CHUNK = 4096  # vectors that are added up in their own precision, before float64 takes over
BLOCK = 96  # columns that are multiplied at once, to leave out most of what lies below the diagonal


class PatchMoments:
    """The number, the sum and the sum of outer products of vectors (..., D), in float64 and O(D^2) memory.

    They are kept on `device`, or on the CPU if that has no float64, such as Apple's MPS. Whatever is asked of them raises a
    ValueError if no vector was seen, or if one was not finite.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        try:
            self.count = torch.zeros((), dtype=torch.float64, device=device)
        except (TypeError, RuntimeError):  # a device without float64, such as Apple's MPS
            device, self.count = "cpu", torch.zeros((), dtype=torch.float64)
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, patches: torch.Tensor):
        """Adds patches (..., D), which are multiplied in their own precision, float32 at least."""
        patches = patches.reshape(-1, patches.shape[-1]).to(self.count.device)
        patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
        for start in range(0, len(patches), CHUNK):
            chunk = patches[start : start + CHUNK]
            mean, n = chunk.mean(0), len(chunk)
            chunk = chunk - mean  # what is rounded is the variance, not the distance from zero
            with torch.autocast(chunk.device.type, enabled=False):
                for i in range(0, len(mean), BLOCK):  # a symmetric matrix is its upper triangle
                    self.outer[i : i + BLOCK, i:] += chunk[:, i : i + BLOCK].T @ chunk[:, i:]
            mean = mean.double()
            self.outer.addr_(mean, mean, alpha=n)
            self.sum += n * mean
            self.count += n

    def _double(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.count.device).double()  # first to a device that has float64

    def all_reduce(self):
        """Adds up the moments of all processes, where there are several."""
        if dist.is_available() and dist.is_initialized():
            for tensor in (self.count, self.sum, self.outer):
                dist.all_reduce(tensor)

    def second_moment(self, about: torch.Tensor) -> torch.Tensor:
        """The mean (D, D) of (x - about) (x - about)^T, in float64."""
        about = self._double(about)
        outer = self.outer.triu() + self.outer.triu(1).T
        cross = self._mean().outer(about)
        return outer / self.count - cross - cross.T + about.outer(about)

    def variance_along(self, rows: torch.Tensor, about: torch.Tensor) -> torch.Tensor:
        """The mean (n,) of the squares of rows (n, D) times x - about, in float64."""
        rows = self._double(rows)
        return ((rows @ self.second_moment(about)) * rows).sum(dim=1)

    def variance(self) -> torch.Tensor:
        """The variance (D,) of each number of a vector, in float64."""
        return self.outer.diagonal() / self.count - self._mean().square()

    def _mean(self) -> torch.Tensor:
        if self.count == 0:
            raise ValueError("statistics of patches need at least one image, got none")
        if not torch.isfinite(self.outer).all():
            raise ValueError("images hold numbers that are not finite")
        return self.sum / self.count

    def components(self, subtract_mean: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """mean (D,), principal components (D, D) as rows, and the variance along each (D,), largest first, in float64.

        The sign of a component is such that its largest entry is positive. Without `subtract_mean`, the mean is zero and
        the "variance" is the second moment about zero.
        """
        mean = self._mean() if subtract_mean else torch.zeros_like(self.sum)
        variance, vectors = torch.linalg.eigh(self.second_moment(mean))
        variance, components = variance.flip(0).clamp(min=0), vectors.T.flip(0)
        largest = components.abs().argmax(dim=1, keepdim=True)
        return mean, components * components.gather(1, largest).sign(), variance


__all__ = ["PatchMoments"]
