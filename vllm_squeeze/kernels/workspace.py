"""Memory that the kernels work in, allocated once, so that a step allocates nothing and a CUDA graph can replay it."""

import dataclasses
from dataclasses import dataclass

import torch

from vllm_squeeze.kernels.tables import NUM_ROW_FACTS
from vllm_squeeze.kernels.tiles import MAX_BLOCK, MAX_TILE_ROWS, MAX_TILES_AT_ONCE, PART_KEYS

MAX_PROGRAMS_PER_MULTIPROCESSOR = 3
"""Of programs that attend: small tiles need more of them at a time to hide their waits, and large ones have no room."""

LOOK_UPS_PER_MULTIPROCESSOR = 4
"""Programs that look up clusters, if there is one tile of few rows: as many as run at a time, so that none waits for one
that has yet to start."""

MAX_MASSES, SPLITS_PER_MASS = 16, 4
"""Programs that sum up the groups of one tile and KV head, and how many look up its clusters for each of them: so that
they take about as long."""

INTERPRETED_MULTIPROCESSORS = 2
"""Stands for the device's number under Triton's interpreter, which runs one program after the other."""


@dataclass(frozen=True)
class Workspace:
    """What the kernels hand to each other. All layers may share one, as they run one after the other.

    N counts the tiles handled at once, M the rows of a tile at most. Logits are to the base 2.

    Attributes:
        num_splits: programs that look up the clusters of one tile and KV head, at most.
        multiprocessors: of the device.
        logits: [N, H, M, C] float32, of all keys of a cluster together: s q.c_i + log N_i, raised as if not chosen.
        row_facts: [N, H, SPLITS, NUM_ROW_FACTS, M] float32, what each split notes of the tile's rows: the log-sum-exp of
            what all clusters attract and half the squared length of the scaled query, to the base 2; in how many units
            of its products with the directions of residuals a logit is told; and these products in 8 bits, as
            ``_store_aimed``.
        chosen: [N, H, C] int32, a bit for each token of the tile that chose the cluster, to look at its keys.
        bases: [N, H, C, M] int16, of clusters that a token chose, to look at their keys: by how much a key at the
            cluster's mean key exceeds the threshold, as ``_choose``.
        picked: [N, H, parts, 2] int64, the chosen clusters in parts of a few keys, those of a split together: the cluster
            and above it where the part's keys begin among the members; how many they are, and above the cluster's bits.
        found: [N, H, T] int64, the chosen keys, those of a split together: the number of the member, and above it a bit
            for each token of the tile that chose the key.
        list_places: [N, H, T] int32, where in the KV cache the listed keys lie: block times page size plus place in
            the block.
        list_bits: [N, H, T] int32, a bit for each token of the tile that attends to the key.
        listed: [N, H] int32, keys in the list, those always attended to among them.
        turns: [N, H] int32, how often clusters were looked up for the tile and head of this number, modulo 2**32.
        masses: [N, H, SPLITS / SPLITS_PER_MASS, M] int64, log-sum-exp of the logits of one share of the groups, float32,
            in the lower half; the turn in which it was said in the upper one.
        kept: [N, H, SPLITS] int64, the same of chosen keys in one split.
        kept_pairs: [N, H, SPLITS] int32, the same keys, counted once for each token that chose them.
        partial_output: [programs, M, D] float32, attention of one program.
        partial_lse: [programs, M] float32, and its log-sum-exp; minus infinity where it had nothing to attend to.
    """

    num_splits: int
    multiprocessors: int
    logits: torch.Tensor
    row_facts: torch.Tensor
    chosen: torch.Tensor
    bases: torch.Tensor
    picked: torch.Tensor
    found: torch.Tensor
    list_places: torch.Tensor
    list_bits: torch.Tensor
    listed: torch.Tensor
    turns: torch.Tensor
    masses: torch.Tensor
    kept: torch.Tensor
    kept_pairs: torch.Tensor
    partial_output: torch.Tensor
    partial_lse: torch.Tensor

    @classmethod
    def allocate(
        cls,
        max_tiles: int,
        num_kv_heads: int,
        head_size: int,
        max_centroids: int,
        max_keys: int,
        device: torch.device | str,
    ) -> "Workspace":
        """Allocates for given limits.

        Args:
            max_tiles: tiles handled at once; more are handled in turns.
            num_kv_heads: KV heads of this rank, H.
            head_size: D.
            max_centroids: the most clusters of any one prefix, C; may be 0.
            max_keys: the most tokens of any one prefix, T.
            device: where the kernels run.

        Raises:
            ValueError: if a size is not positive, or there are too many tiles.
        """
        limits = {"max_tiles": max_tiles, "num_kv_heads": num_kv_heads, "head_size": head_size, "max_keys": max_keys}
        for name, size in limits.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if max_tiles > MAX_TILES_AT_ONCE:
            raise ValueError(f"max_tiles must be at most {MAX_TILES_AT_ONCE}, got {max_tiles}")
        device = torch.device(device)
        multiprocessors = INTERPRETED_MULTIPROCESSORS
        if device.type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        look_ups = LOOK_UPS_PER_MULTIPROCESSOR * multiprocessors // num_kv_heads
        num_masses = min(max(look_ups // (1 + SPLITS_PER_MASS), 1), MAX_MASSES)
        num_splits = num_masses * SPLITS_PER_MASS
        # the plan gives each tile and KV head one program more than its share, at most
        num_programs = max(MAX_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors, 2 * max_tiles * num_kv_heads)
        # whole rows of 64 bytes, so that Triton compiles one variant of the kernels for all of them; and the last
        # block may look beyond the end
        max_centroids += -max_centroids % 16 + MAX_BLOCK
        max_keys += -max_keys % 16 + MAX_BLOCK
        heads = max_tiles, num_kv_heads

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return cls(
            num_splits=num_splits,
            multiprocessors=multiprocessors,
            logits=empty(*heads, MAX_TILE_ROWS, max_centroids),
            row_facts=empty(*heads, num_splits, NUM_ROW_FACTS, MAX_TILE_ROWS),
            chosen=empty(*heads, max_centroids, dtype=torch.int32),
            bases=empty(*heads, max_centroids, MAX_TILE_ROWS, dtype=torch.int16),
            picked=empty(*heads, max_centroids + max_keys // PART_KEYS, 2, dtype=torch.int64),
            found=empty(*heads, max_keys, dtype=torch.int64),
            list_places=empty(*heads, max_keys, dtype=torch.int32),
            list_bits=empty(*heads, max_keys, dtype=torch.int32),
            listed=empty(*heads, dtype=torch.int32),
            # nothing said yet
            turns=empty(*heads, dtype=torch.int32).zero_(),
            masses=empty(*heads, num_masses, MAX_TILE_ROWS, dtype=torch.int64).zero_(),
            kept=empty(*heads, num_splits, dtype=torch.int64).zero_(),
            kept_pairs=empty(*heads, num_splits, dtype=torch.int32),
            partial_output=empty(num_programs, MAX_TILE_ROWS, head_size),
            partial_lse=empty(num_programs, MAX_TILE_ROWS),
        )

    @property
    def max_tiles(self) -> int:
        """How many tiles are handled at once."""
        return len(self.logits)

    def num_programs(self, per_multiprocessor: int) -> int:
        """How many programs attend to the listed keys of all tiles and KV heads."""
        tiles, heads = self.listed.shape
        return max(per_multiprocessor * self.multiprocessors, 2 * tiles * heads)

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
