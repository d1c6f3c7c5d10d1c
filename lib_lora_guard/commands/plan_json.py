"""The plan as one JSON document. Its names are stable: additions get new names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..checkpoints.model_header import DENOISER, OTHER, TEXT, VAE, Checkpoint
from ..files import shown
from ..planning.predict import Prediction
from ..planning.rates import BANDWIDTH_EFFICIENCY, CPU_MERGE_VALUES, EFFICIENCY, GpuRates
from ..planning.usual_parts import VAE_KIND
from ..version import __version__
from .answer import answer, fits
from .page import MESSAGE_CHARACTERS, SHOWN_KEYS, counts
from .plan import PlanResult, encoders_missing, not_counted, not_in_file
from .stack import StackedLora

SCHEMA = "lora-guard/plan/1"


def plan_document(result: PlanResult) -> dict[str, Any]:
    """Returns the document."""
    request = result.request
    return {
        "schema": SCHEMA,
        "version": __version__,
        "model": _model(result),
        "machine": {
            "vram_bytes": request.vram_bytes,
            "ram_bytes": request.ram_bytes,
            "assumed_rates": _rates(request.rates),
        },
        "picture": {
            "width": request.picture.width,
            "height": request.picture.height,
            "batch": request.picture.batch,
            "forward_batch": result.tokens.rows,
            "image_tokens": result.tokens.image,
            "text_tokens": result.tokens.text,
        },
        "mode": request.wish.value,
        "loras": [_lora(lora) for lora in result.stack.loras],
        "predicted": [_prediction(prediction, result.model.not_counted) for prediction in result.predictions],
        "advice": [shown(line, MESSAGE_CHARACTERS) for line in result.advice],
        "fits": fits(result),
        "answer": str(answer(result)),
        "beside": [
            {
                "part": part.part,
                "kinds": list(part.kinds),
                "name": part.name,
                "bytes": part.bytes,
                "is_assumed": part.is_assumed,
            }
            for part in result.beside
        ],
    }


def _model(result: PlanResult) -> dict[str, Any]:
    checkpoint = result.checkpoint
    return {
        "file": shown(checkpoint.header.path.name),
        "container": checkpoint.header.container,
        "file_bytes": checkpoint.header.bytes,
        "architecture": checkpoint.architecture.value if checkpoint.architecture else None,
        "formats": counts(checkpoint.formats()),
        "is_scaled_fp8": checkpoint.is_scaled_fp8,
        "denoiser_parameters": len(checkpoint.of_part(DENOISER)),
        "part_bytes": part_bytes(checkpoint),
        "not_in_file": not_in_file(checkpoint),
        "text_encoders_not_in_file": encoders_missing(checkpoint),
        "not_counted": not_counted(result.unknown),
        "text_encoders_not_counted": [kind for kind in result.unknown if kind != VAE_KIND],
        "denoiser_memory_bytes": result.model.denoiser_bytes,
        "activation_estimate_bytes": result.model.activation_bytes,
        "forge_activation_estimate_bytes": result.forge_activation_bytes,
    }


def part_bytes(checkpoint: Checkpoint) -> dict[str, int]:
    """Returns the bytes in the file by part of the model."""
    return {part: sum(p.bytes for p in checkpoint.of_part(part)) for part in (DENOISER, TEXT, VAE, OTHER)}


def _rates(rates: GpuRates) -> dict[str, Any]:
    return {
        "gpu": rates.name,
        "memory_bytes_per_second": rates.memory_bytes_per_second,
        "memory_efficiency": BANDWIDTH_EFFICIENCY,
        "matrix_flops": rates.matrix_flops,
        "matrix_efficiency": EFFICIENCY,
        "pcie_pinned_bytes_per_second": rates.pinned,
        "pcie_pageable_to_gpu_bytes_per_second": rates.pageable_to_gpu,
        "pcie_pageable_to_ram_bytes_per_second": rates.pageable_to_ram,
        "cpu_merge_values_per_second": CPU_MERGE_VALUES,
        "compute_value_bytes": rates.compute_bytes,
    }


def _lora(lora: StackedLora) -> dict[str, Any]:
    facts = lora.facts
    return {
        "file": facts.name,
        "strength": lora.strength,
        "file_bytes": facts.header.bytes,
        "tensor_bytes": facts.bytes,
        "made_for": facts.made_for.value if facts.made_for else None,
        "is_usable": lora.fit.refused is None,
        "refused": None if lora.fit.refused is None else shown(lora.fit.refused, 300),
        "modules": len(facts.file.adapters),
        "modules_used": lora.fit.used if lora.fit.refused is None else 0,
        "keys_skipped": len(lora.fit.skipped),
        "first_skipped": [shown(lora.facts.file.spelled(key)) for key in lora.fit.skipped[:SHOWN_KEYS]],
        "keys_lost": len(lora.fit.lost),
        "first_lost": [shown(key, 300) for key in lora.fit.lost[:SHOWN_KEYS]],
        "kinds": counts(facts.kinds),
        "dora_modules": facts.dora_modules,
        "ranks": counts(facts.ranks),
        "dtypes": counts(facts.dtypes),
        "modes": {
            mode: {"weights": share.count, "bytes": share.bytes, "reasons": sorted(share.reasons)}
            for mode, share in sorted(lora.modes.items())
        },
    }


def _prediction(prediction: Prediction, missing: Sequence[str]) -> dict[str, Any]:
    return {
        "way": prediction.way.value,
        # Null where all that is counted fits and parts of the model are not counted.
        "fits": None if prediction.fits and missing else prediction.fits,
        "problem": prediction.problem,
        "lora_effect": prediction.effect.value,
        "vram_peak_bytes": prediction.vram_peak_bytes,
        "vram_missing_bytes": prediction.excess_bytes,
        "model_on_gpu_bytes": prediction.weights_on_gpu_bytes,
        "model_swapped_bytes": prediction.swapped_bytes,
        "lora_on_gpu_bytes": prediction.factor_bytes,
        "ram_peak_bytes": prediction.ram_peak_bytes,
        "ram_missing_bytes": prediction.ram_short_bytes,
        "ram_backup_bytes": prediction.backup_bytes,
        "apply_seconds": round(prediction.apply_seconds, 4),
        "change_strength_seconds": round(prediction.change_seconds, 4),
        "extra_step_seconds": round(prediction.extra_step_seconds, 5),
    }
