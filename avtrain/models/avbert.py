"""The audio-visual Transformer: local embeddings of each segment, then single-modality and multimodal Transformers.

A clip goes through `AVBert.forward` top to bottom: `embed` (CNN, projection, LayerNorm for every segment), then
`contextualize` (BOS and positions, visual and audio Transformer, multimodal Transformer).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from avtrain.config import ModelConfig
from avtrain.models.cnn import AudioCNN, SlowFastCNN, VisualCNN
from avtrain.models.transformer import LAYER_NORM_EPS, Encoder

VISUAL, AUDIO = 0, 1  # rows of the BOS and modality embeddings


class LocalEmbeddings(NamedTuple):
    """What the CNNs make of every segment by itself; zeros where a segment is absent."""

    visual_pooled: Tensor  # (batch, segments, visual channels)
    audio_pooled: Tensor   # (batch, segments, audio channels)
    visual_local: Tensor   # (batch, segments, D)
    audio_local: Tensor    # (batch, segments, D)

    def pooled(self, modality: int) -> Tensor:
        """Of `VISUAL` or `AUDIO`, from the CNN."""
        return (self.visual_pooled, self.audio_pooled)[modality]

    def local(self, modality: int) -> Tensor:
        """Of `VISUAL` or `AUDIO`, projected."""
        return (self.visual_local, self.audio_local)[modality]


class Tokens(NamedTuple):
    """What the Transformers make of them, BOS first; zeros where a segment or a whole modality is absent."""

    visual_tokens: Tensor | None      # (batch, 1 + segments, D); None with early fusion
    audio_tokens: Tensor | None       # (batch, 1 + segments, D); None with early fusion
    multimodal_tokens: Tensor | None  # (batch, 2 + 2 * segments, D), visual first; None with late fusion


class AVBertOutput(NamedTuple):
    """Everything `AVBert.forward` computes: the fields of `LocalEmbeddings` and of `Tokens`."""

    visual_pooled: Tensor
    audio_pooled: Tensor
    visual_local: Tensor
    audio_local: Tensor
    visual_tokens: Tensor | None
    audio_tokens: Tensor | None
    multimodal_tokens: Tensor | None


class AVBert(nn.Module):
    """The whole model (paper, section 3).

    Args:
        config: sizes, fusion and sharing.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.over_ranks = False
        visual_network = VisualCNN if config.visual == "slow50" else SlowFastCNN
        self.visual_cnn = visual_network(config.visual_width, config.visual_blocks, config.stages_recomputed)
        self.audio_cnn = AudioCNN(config.audio_width, config.audio_blocks, config.audio_stem_stride,
                                  config.log_mel_mean, config.log_mel_std, config.stages_recomputed)
        self.visual_projection = nn.Linear(self.visual_cnn.outputs, config.dimension)
        self.visual_norm = nn.LayerNorm(config.dimension, eps=LAYER_NORM_EPS)
        self.audio_projection = nn.Linear(self.audio_cnn.outputs, config.dimension)
        self.audio_norm = nn.LayerNorm(config.dimension, eps=LAYER_NORM_EPS)
        self.bos = nn.Parameter(torch.randn(2, config.dimension) * 0.02)
        if config.fusion != "early":
            self.visual_embedding = TokenEmbedding(config)
            self.audio_embedding = TokenEmbedding(config)
        if config.fusion != "late":
            self.modality = nn.Parameter(torch.randn(2, config.dimension) * 0.02)
            self.multimodal_embedding = TokenEmbedding(config)
        # Transformers by number: visual 0, audio 1, multimodal last.
        self.encoder = Encoder(config, transformers={"early": 1, "mid": 3, "late": 2}[config.fusion])

    def forward(self, visual: Tensor | None, audio: Tensor | None, visual_present: Tensor | None = None,
                audio_present: Tensor | None = None) -> AVBertOutput:
        """Embed a batch of clips. In eval mode a clip's outputs depend on nothing else in the batch.

        Args:
            visual: (batch, segments, 3, frames, height, width), uint8, or floats normalised as (x / 255 - 0.45) /
                0.225; None if no clip has pictures.
            audio: (batch, segments, 1, mels, frames), log-mel; None if no clip has sound.
            visual_present: (batch, segments) boolean, which segments have pictures; None: all. What an absent
                segment's pixels hold does not matter.
            audio_present: the same for sound.

        Raises:
            ValueError: neither modality is given, or shapes do not fit each other or the model.
        """
        local, visual_present, audio_present = self.embed(visual, audio, visual_present, audio_present)
        tokens = self.contextualize(local.visual_local, local.audio_local, visual_present, audio_present)
        return AVBertOutput(*local, *tokens)

    def embed(self, visual: Tensor | None, audio: Tensor | None, visual_present: Tensor | None = None,
              audio_present: Tensor | None = None) -> tuple[LocalEmbeddings, Tensor, Tensor]:
        """Each segment by itself: CNN, global average, Linear, LayerNorm.

        Args:
            visual, audio, visual_present, audio_present: as in `forward`.

        Returns:
            The embeddings, and both presence masks, (batch, segments), filled in where they were None.

        Raises:
            ValueError: as `forward`.
        """
        batch, segments = self._clip_shape(visual, audio, visual_present, audio_present)
        there: list[Tensor] = []
        presence: list[Tensor] = []
        here: list[Tensor | None] = []
        for x, present in ((visual, visual_present), (audio, audio_present)):
            flat = self.bos.new_zeros(0) if x is None else x.flatten(0, 1)
            if x is not None and present is None:
                here.append(None)
                present = torch.ones(batch, segments, dtype=torch.bool, device=x.device)
            elif x is None or present is None:
                here.append(torch.zeros(0, dtype=torch.int64, device=self.bos.device))
                present = torch.zeros(batch, segments, dtype=torch.bool, device=self.bos.device)
            else:
                positions = present.flatten().nonzero().squeeze(1)
                here.append(positions)
                flat = flat if len(positions) == len(flat) else flat[positions]
            there.append(flat)
            presence.append(present)
        embedded = self.embed_segments(there[VISUAL], there[AUDIO], presence[VISUAL], presence[AUDIO],
                                       (here[VISUAL], here[AUDIO]))
        return embedded, presence[VISUAL], presence[AUDIO]

    def embed_segments(self, visual: Tensor, audio: Tensor, visual_present: Tensor, audio_present: Tensor,
                       here: tuple[Tensor | None, Tensor | None]) -> LocalEmbeddings:
        """The same from the segments that are there alone; nothing on the device is waited for.

        Args:
            visual: (seen, 3, frames, height, width); not looked at where there are no positions.
            audio: (heard, 1, mels, frames); the same.
            visual_present, audio_present: (batch, segments) boolean.
            here: (visual, audio) positions of these segments, clip * segments + segment; None: all.
        """
        visual_pooled = self._pool(self.visual_cnn, visual, visual_present.shape, here[VISUAL])
        audio_pooled = self._pool(self.audio_cnn, audio, audio_present.shape, here[AUDIO])
        visual_local = self.visual_norm(self.visual_projection(visual_pooled)) * visual_present.unsqueeze(-1)
        audio_local = self.audio_norm(self.audio_projection(audio_pooled)) * audio_present.unsqueeze(-1)
        return LocalEmbeddings(visual_pooled, audio_pooled, visual_local, audio_local)

    def measure_over_ranks(self) -> None:
        """From now on, in training, BatchNorms measure the segments of all processes of the run."""
        self.over_ranks = True
        for norm in self.modules():
            if isinstance(norm, _BatchNorm):
                norm.over_ranks = True  # type: ignore[assignment]

    @torch.no_grad()
    def standardize(self, visual: Tensor | None, audio: Tensor | None, visual_present: Tensor | None = None,
                    audio_present: Tensor | None = None) -> None:
        """Start values of the projections from data: pooled channels are brought to zero mean and unit deviation.

        What a random CNN gives for different segments is nearly all alike: the average cosine is 0.8. Without this,
        that common part hides from the Transformers what they should tell apart.

        Args:
            visual, audio, visual_present, audio_present: some clips, as in `forward`; a modality without any
                segments is left as it is.
        """
        local, *presence = self.embed(visual, audio, visual_present, audio_present)
        for pooled, present, projection in zip((local.visual_pooled, local.audio_pooled), presence,
                                               (self.visual_projection, self.audio_projection), strict=True):
            if int(present.sum()) > 1:
                rows = pooled[present].to(projection.weight.dtype)
                deviation = rows.std(0)
                projection.weight /= deviation.clamp(min=0.01 * float(deviation.max()))  # a dead channel stays small
                projection.bias.copy_(-projection.weight @ rows.mean(0))

    def contextualize(self, visual_local: Tensor, audio_local: Tensor, visual_present: Tensor,
                      audio_present: Tensor) -> Tokens:
        """The Transformers on local embeddings, some of which the caller may have replaced by others (masking).

        Args:
            visual_local, audio_local: (batch, segments, D).
            visual_present, audio_present: (batch, segments) boolean.
        """
        folded = self.encoder.fold()
        visual, visual_present = self._with_bos(visual_local, visual_present, VISUAL)
        audio, audio_present = self._with_bos(audio_local, audio_present, AUDIO)
        if self.config.fusion == "early":
            multimodal = self._fuse(visual, audio)
            present = torch.cat((visual_present, audio_present), 1)
            return Tokens(None, None, self.encoder(multimodal, present, 0, folded))
        visual = self.encoder(self.visual_embedding(visual), visual_present, 0, folded)
        audio = self.encoder(self.audio_embedding(audio), audio_present, 1, folded)
        if self.config.fusion == "late":
            return Tokens(visual, audio, None)
        multimodal = self._fuse(visual, audio)
        present = torch.cat((visual_present, audio_present), 1)
        return Tokens(visual, audio, self.encoder(multimodal, present, 2, folded))

    def _with_bos(self, local: Tensor, present: Tensor, modality: int) -> tuple[Tensor, Tensor]:
        """BOS before the segments; it is present where any segment is. (batch, 1 + segments, D) and its mask."""
        bos = self.bos[modality].expand(local.shape[0], 1, -1)
        return torch.cat((bos, local), 1), torch.cat((present.any(1, keepdim=True), present), 1)

    def _fuse(self, visual: Tensor, audio: Tensor) -> Tensor:
        """Both sequences in one, with positions that start anew and modality embeddings, (batch, 2 + 2 T, D)."""
        marked = (visual + self.modality[VISUAL], audio + self.modality[AUDIO])
        embedded: Tensor = self.multimodal_embedding(*marked)
        return embedded

    def _clip_shape(self, visual: Tensor | None, audio: Tensor | None, visual_present: Tensor | None,
                    audio_present: Tensor | None) -> tuple[int, int]:
        given = visual if visual is not None else audio
        if given is None:
            raise ValueError("visual or audio must be given")
        batch, segments = given.shape[:2]
        if segments > self.config.max_segments:
            raise ValueError(f"{segments} segments: the model has positions for {self.config.max_segments}")
        for name, x, rank in (("visual", visual, 6), ("audio", audio, 5), ("visual_present", visual_present, 2),
                              ("audio_present", audio_present, 2)):
            if x is not None and (x.dim() != rank or x.shape[:2] != (batch, segments)):
                raise ValueError(f"{name} is {tuple(x.shape)}: {rank} dimensions, {batch} clips and {segments} "
                                 "segments are wanted")
        return batch, segments

    def _pool(self, cnn: VisualCNN | SlowFastCNN | AudioCNN, x: Tensor, shape: torch.Size,
              here: Tensor | None) -> Tensor:
        """(batch, segments, channels) from the segments that are there, zeros elsewhere."""
        if here is not None and len(here) == 0 and not (self.over_ranks and self.training):
            # A BatchNorm has no statistics of nothing, unless other processes have some.
            return self._nothing(cnn, shape)
        pooled: Tensor = cnn(x)
        if here is not None and len(here) != shape.numel():
            pooled = pooled.new_zeros(shape.numel(), cnn.outputs).index_copy(0, here, pooled)
        return pooled.view(*shape, -1)

    def _nothing(self, cnn: VisualCNN | SlowFastCNN | AudioCNN, shape: torch.Size) -> Tensor:
        """Zeros, with a gradient of zero for every parameter: processes of one run must all have the same ones."""
        zeros = self.bos.new_zeros(*shape, cnn.outputs)
        if torch.is_grad_enabled():
            zeros = zeros + 0 * torch.stack([parameter.sum() for parameter in cnn.parameters()]).sum()
        return zeros


class TokenEmbedding(nn.Module):
    """Learned positions, LayerNorm, dropout, before a Transformer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1 + config.max_segments, config.dimension) * 0.02)
        self.norm = nn.LayerNorm(config.dimension, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, *sequences: Tensor) -> Tensor:
        """Sequences of (batch, length, D), positions from 0 for each -> one of (batch, sum of lengths, D)."""
        placed = torch.cat([sequence + self.positions[:sequence.shape[1]] for sequence in sequences], 1)
        embedded: Tensor = self.dropout(self.norm(placed))
        return embedded
