"""Dense heads: from trunk tokens to full-resolution maps, one frame at a time.

Shapes: F frames (batch and frames flattened), h x w patches, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FRAMES_PER_CHUNK = 8  # dense heads hold maps at full resolution, so they go through long windows in pieces


def in_chunks(head: Callable[..., Tensor], *per_frame: Tensor) -> Tensor:
    """Apply a per-frame head to tensors [F, ...] a few frames at a time."""
    pieces = [head(*piece) for piece in zip(*(x.split(FRAMES_PER_CHUNK) for x in per_frame))]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class ResidualUnit(nn.Module):
    """Two activated convolutions with a skip; ``relu_skip``: the skip starts behind the first activation."""

    def __init__(self, features: int, relu_skip: bool) -> None:
        super().__init__()
        self.relu_skip = relu_skip
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(x)
        return self.conv2(F.relu(self.conv1(y))) + (y if self.relu_skip else x)


class Fusion(nn.Module):
    """Add a finer map to the running one, refine, resize, mix."""

    def __init__(self, features: int, first: bool, relu_skip: bool) -> None:
        super().__init__()
        if not first:
            self.unit1 = ResidualUnit(features, relu_skip)
        self.unit2 = ResidualUnit(features, relu_skip)
        self.out_conv = nn.Conv2d(features, features, 1)

    def forward(self, x: Tensor, finer: Tensor | None, size: tuple[int, int]) -> Tensor:
        if finer is not None:
            x = x + self.unit1(finer)
        x = F.interpolate(self.unit2(x), size=size, mode="bilinear", align_corners=True)
        return self.out_conv(x)


class Dpt(nn.Module):
    """Dense prediction transformer (Ranftl et al. 2021): four taps to one feature map [F, features, rows, columns].

    ``positions``: add 0.1 times a sine embedding of the pixel's place to the projected taps.
    ``upsample``: rows and columns of the result per patch row and column.
    """

    def __init__(
        self,
        in_dim: int,
        channels: Sequence[int],
        features: int,
        *,
        norm: bool = True,
        positions: bool = True,
        relu_skip: bool = False,
        upsample: int = 8,
    ) -> None:
        super().__init__()
        self.positions, self.upsample = positions, upsample
        self.norm = nn.LayerNorm(in_dim) if norm else nn.Identity()
        self.project = nn.ModuleList(nn.Conv2d(in_dim, c, 1) for c in channels)
        self.resize = nn.ModuleList(
            [
                nn.ConvTranspose2d(channels[0], channels[0], 4, stride=4),
                nn.ConvTranspose2d(channels[1], channels[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(channels[3], channels[3], 3, stride=2, padding=1),
            ]
        )
        self.adapt = nn.ModuleList(nn.Conv2d(c, features, 3, padding=1, bias=False) for c in channels)
        self.fuse = nn.ModuleList(Fusion(features, level == 3, relu_skip) for level in range(4))

    def forward(self, taps: Sequence[Tensor], grid: tuple[int, int], aspect: float) -> Tensor:
        """Taps [F, h * w, in_dim], patch grid, image width over height."""
        maps = []
        for tap, project, resize, adapt in zip(taps, self.project, self.resize, self.adapt):
            x = self.norm(tap).transpose(1, 2).unflatten(2, grid)  # [F, in_dim, h, w]
            x = project(x)
            if self.positions:
                x = x + place_embedding(x, aspect)
            maps.append(adapt(resize(x)))
        sizes = [(self.upsample * grid[0], self.upsample * grid[1])] + [(m.shape[-2], m.shape[-1]) for m in maps[:3]]
        x = self.fuse[3](maps[3], None, sizes[3])
        for level in (2, 1, 0):
            x = self.fuse[level](x, maps[level], sizes[level])
        return x


class DptHead(nn.Module):
    """A Dpt with one or more convolutional outputs at full resolution."""

    def __init__(
        self,
        in_dim: int,
        channels: Sequence[int],
        features: int,
        outputs: Sequence[int],
        *,
        norm: bool = True,
        positions: bool = True,
        relu_skip: bool = False,
    ) -> None:
        super().__init__()
        self.dpt = Dpt(in_dim, channels, features, norm=norm, positions=positions, relu_skip=relu_skip)
        self.positions = positions
        self.narrow = nn.Conv2d(features, features // 2, 3, padding=1)
        self.out = nn.ModuleList(
            nn.Sequential(nn.Conv2d(features // 2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, n, 1)) for n in outputs
        )

    def forward(self, taps: Sequence[Tensor], grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Taps [F, h * w, in_dim] to raw maps [F, sum of outputs, H, W]."""
        aspect = size[1] / size[0]
        return in_chunks(lambda *t: self._one_chunk(t, grid, size, aspect), *taps)

    def _one_chunk(self, taps: Sequence[Tensor], grid: tuple[int, int], size: tuple[int, int], aspect: float) -> Tensor:
        x = self.narrow(self.dpt(taps, grid, aspect))
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
        if self.positions:
            x = x + place_embedding(x, aspect)
        return torch.cat([out(x) for out in self.out], dim=1)


def place_grid(rows: int, columns: int, aspect: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Places of columns [columns] and rows [rows]: the image spans a rectangle of this aspect, half diagonal one."""
    diagonal = (aspect**2 + 1) ** 0.5
    spans = ((aspect / diagonal, columns), (1 / diagonal, rows))
    along_x, along_y = (
        torch.linspace(-span * (n - 1) / n, span * (n - 1) / n, n, device=device, dtype=torch.float64)
        for span, n in spans
    )
    return along_x, along_y


def place_embedding(x: Tensor, aspect: float) -> Tensor:
    """0.1 times sines and cosines of the place in the image, [1, C, rows, columns] for x [F, C, rows, columns].

    Frequency base 100; the first half of the channels is for x, the second for y.
    """
    channels, rows, columns = x.shape[1:]
    frequency = 100.0 ** -(torch.arange(channels // 4, device=x.device, dtype=torch.float64) / (channels / 4))

    def waves(place: Tensor) -> Tensor:
        angle = place[:, None] * frequency  # [n, C / 4]
        return torch.cat([angle.sin(), angle.cos()], dim=1).to(x.dtype)  # [n, C / 2]

    along_x, along_y = (waves(place) for place in place_grid(rows, columns, aspect, x.device))
    table = torch.cat([along_x.expand(rows, -1, -1), along_y[:, None].expand(-1, columns, -1)], dim=-1)
    return 0.1 * table.permute(2, 0, 1)[None]  # [1, C, rows, columns]
