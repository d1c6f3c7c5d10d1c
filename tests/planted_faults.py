"""Plants faults in a copy of the tree, one at a time, and says which test sees each of them. Run by hand:

    python tests/planted_faults.py [--root DIR] [--only WORD]

A fault is found by its text, in whatever file has it, so a module may move without a change here. A fault counts as caught
where a test fails with it and passes without it.

To be run with the Python of README's second line: with a checkout on its path, what Forge's start runs in the tests is that
checkout and not the copy.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from support import warm

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("lib_lora_guard", "tests", "scripts", "javascript", "benchmarks", "docs")
SEARCHED = ("lib_lora_guard", "scripts", "javascript", "preload.py")
PYTEST = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
FAILED = re.compile(r"^(?:FAILED|ERROR) (tests/.+?)(?: - .*)?$", re.MULTILINE)


@dataclass(frozen=True)
class Fault:
    """`right` stands once in the product and is replaced by `wrong`. The tests in `folders` are asked, and before all of
    them those of the files in `likely` that there are.

    The same name twice: where the product has been rewritten, an older state of it has the other text. One of a name fits
    the product as it is; `test_planted_faults.py` sees to it."""

    name: str
    right: str
    wrong: str
    folders: str
    likely: str = ""


FAULTS = [
    # Values: adapters and how they reach a weight.
    Fault("a layer is skipped", "coming = [new for key, new in target.items() if before.get(key) is not new]", "coming = [new for key, new in target.items() if before.get(key) is not new][1:]", "patching contract", "patching/test_engine.py"),
    Fault("a layer is skipped", "coming: list[Coming] = [(old, new) for key, new in target.items() if (old := present.get(key)) is not new]", "coming: list[Coming] = [(old, new) for key, new in target.items() if (old := present.get(key)) is not new][1:]", "patching contract", "patching/test_engine.py"),
    Fault("alpha is ignored", "return 1.0 if self.alpha is None else self.alpha / self.down.shape[0]", "return 1.0", "adapters patching", "adapters/test_files.py"),
    Fault("alpha is ignored", "return 1.0 if self.alpha is None or rank is None else self.alpha / rank", "return 1.0", "adapters patching", "adapters/test_ranked.py adapters/test_kinds.py"),
    Fault("the rank's scale is squared", "self.alpha / self.down.shape[0]", "self.alpha / self.down.shape[0] ** 2", "adapters patching", "adapters/test_files.py"),
    Fault("the rank's scale is squared", "return 1.0 if self.alpha is None or rank is None else self.alpha / rank", "return 1.0 if self.alpha is None or rank is None else self.alpha / rank**2", "adapters patching", "adapters/test_ranked.py adapters/test_kinds.py"),
    Fault("strength 5 % off in a bypass", "return tuple(s * entry.factors.scale for", "return tuple(1.05 * s * entry.factors.scale for", "patching", "patching/test_bypass.py"),
    Fault("strength 5 % off in a bypass", "return tuple([s * entry.factors.scale for", "return tuple([1.05 * s * entry.factors.scale for", "patching", "patching/test_low_rank.py patching/test_bypass.py"),
    Fault("strength 5 % off in a merge", "        factor = strength * self.scale\n", "        factor = 1.05 * strength * self.scale\n", "adapters patching", "adapters/test_kinds.py adapters/test_lora.py"),
    Fault("one of two LoRAs is dropped", "merged.setdefault(key, (site, []))[1].extend(terms)", "merged[key] = (site, list(terms))", "patching contract", "patching/test_engine.py"),
    Fault("one of two LoRAs is dropped", "stacks.setdefault(key, (site, []))[1].extend(terms)", "stacks[key] = (site, list(terms))", "patching contract", "patching/test_engine.py"),
    Fault("one of two LoRAs is dropped", "stacks.setdefault(site.key, (site, []))[1].extend(terms)", "stacks[site.key] = (site, list(terms))", "patching contract", "patching/test_engine.py"),
    Fault("a module's second name is another weight", "first = self._first_paths.get(path, path)", "first = path", "hosts/plain", "hosts/plain/test_layers_of_others.py"),
    # Layers that other code has had its hands on, and compiled models.
    Fault("another program's forward is passed by", "    if own is None:\n        return code\n    return Code.LINEAR", "    if own is not code:\n        return code\n    return Code.LINEAR", "hosts/plain", "hosts/plain/test_layers_of_others.py"),
    Fault("a class with a forward of its own counts as torch's", "    return Code.LINEAR if _is_of(owner.__module__, LINEAR_LIBRARIES) else Code.CLASS", "    return Code.TORCH", "hosts/plain", "hosts/plain/test_layers_of_others.py"),
    Fault("a bypass writes into what others keep", "if self.owns_output is not None and not (", "if False and not (", "hosts/plain", "hosts/plain/test_layers_of_others.py"),
    Fault("hooks of others run before a bypass", "_hook(layer, CHANGE, self, is_first=True)", "_hook(layer, CHANGE, self)", "hosts/plain", "hosts/plain/test_layers_of_others.py"),
    Fault("packed bytes are taken for the weight", "return HiddenWeight(dtype_name(parameter.dtype), shape, None)", "return None", "hosts/plain", "hosts/plain/test_layers_of_others.py"),
    Fault("compiled code does not see a bypass", "        mark(layer, scales_input)\n", "        pass\n", "hosts/plain", "hosts/plain/test_compiled_models.py"),
    Fault("compiled code does not see a bypass", "        return isinstance(layer, StoredLinear) or runs_torchs_code(layer)\n\n    def show_bypass(self, layer: torch.nn.Module, scales_input: bool, call: Forward | None = None) -> None:\n        \"\"\"Lets compiled code see that a bypass is on the layer.\"\"\"\n        mark(layer, (scales_input, call), call=call)\n", "        return isinstance(layer, StoredLinear) or runs_torchs_code(layer)\n\n    def show_bypass(self, layer: torch.nn.Module, scales_input: bool, call: Forward | None = None) -> None:\n        \"\"\"Lets compiled code see that a bypass is on the layer.\"\"\"\n        pass\n", "hosts/plain", "hosts/plain/test_compiled_models.py"),
    Fault("a change of strengths compiles anew", "    while number in table:\n", "    number = -id(hook)\n    while number in table:\n", "hosts/plain", "hosts/plain/test_compiled_models.py"),
    Fault("compiled blocks share a LoRA", "        number = id(layer)\n", "        number = 1\n", "hosts/plain", "hosts/plain/test_compiled_models.py"),
    Fault("DoRA: the norm of the wrong axis", "norm = _norm(base, keep_dim=0)", "norm = _norm(base, keep_dim=1)", "adapters", "adapters/test_kinds.py"),
    Fault("DoRA: the norm of the wrong axis", "keep_dim=0 if by_row else 1", "keep_dim=1 if by_row else 0", "adapters", "adapters/test_dora.py adapters/test_kinds.py"),
    Fault("DoRA: the norm without the delta and the other way round", "        if form.patched_norm:\n", "        if not form.patched_norm:\n", "patching", "patching/test_forward_forms.py patching/test_forward_program.py patching/test_norms.py patching/test_forward_steps.py"),
    Fault("Tucker core transposed", 'torch.einsum("ri...,ij->rj...", mid, down)', 'torch.einsum("ir...,ij->rj...", mid, down)', "adapters patching references", "adapters/test_kinds.py adapters/test_lora.py"),
    Fault("an offset's slice is shifted by one", "return tensor.narrow(self.dim, self.start, self.length)", "return tensor.narrow(self.dim, max(0, self.start - 1), self.length)", "adapters patching", "adapters/test_kinds.py adapters/test_base.py"),
    Fault("a bypass adds to rows shifted by one", "return self.output.narrow(self.channel_dim, part.start, part.length)", "return self.output.narrow(self.channel_dim, max(0, part.start - 1), part.length)", "patching", "patching/test_bypass.py"),
    Fault("LoKr: its strength is lost on the short way", "adapter.scale * term.strength", "adapter.scale", "patching contract", "patching/test_on_the_fly.py contract/test_short_way.py"),
    Fault("LoKr: its strength is lost on a bypass's short way", "return left, right, self.strength * scale", "return left, right, scale", "patching", "patching/test_fused.py"),
    Fault("LoKr: the short way goes beside LoRAs of others", "isinstance(ours, GuardPatches) and ours.terms is terms", "ours is not None", "contract", "contract/test_short_way.py"),
    Fault("LoKr: a kernel for each rank of the others", "groups.setdefault((device, dtype, tuple(sorted(mine))), []).append(kind)", "groups.setdefault((device, dtype, tuple(sorted(set().union(*ranks.values())))), []).append(kind)", "patching", "patching/test_fused_choice.py"),
    Fault("factors for another weight are taken as looked at", "known if known and known.numbers[:2] == (rows, columns) else", "known if known else", "kernels", "kernels/test_kernels.py"),
    Fault("a kernel keeps copies of factors", "        if all(any(one is mine for mine in own) for one in tensors):\n", "        if True:\n", "kernels", "kernels/test_kernels.py"),
    Fault("LoKr: layers without a LoRA take its class", "        or WEIGHT_PATCH in layer.__dict__\n", "", "contract", "contract/test_short_way.py"),
    Fault("LoHa: a sum for the product", "up = (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1)", "up = (a1.unsqueeze(2) + a2.unsqueeze(1)).flatten(1)", "patching", "patching/test_forward_forms.py patching/test_forward_program.py patching/test_norms.py patching/test_forward_steps.py"),
    Fault("LoKr: sides swapped", "delta = torch.kron(left, right.contiguous()).reshape(weight.shape)", "delta = torch.kron(right.contiguous(), left).reshape(weight.shape)", "adapters references", "adapters/test_kinds.py"),
    Fault("LoKr: sides swapped", "blocks, left = weight.view(a, c, b, d, *kernel), left.view(a, 1, b, 1, *[1] * len(kernel))\n            blocks.addcmul_(left, right.unsqueeze(1), ", "blocks, left = weight.view(c, a, d, b, *kernel), left.view(1, a, 1, b, *[1] * len(kernel))\n            blocks.addcmul_(left, right.unsqueeze(1).unsqueeze(3), ", "adapters references", "adapters/test_kinds.py adapters/test_lokr.py"),
    Fault("LoKr: sides swapped where the product is a tensor of its own", "delta = filled(torch.kron(left, right.contiguous()), weight.shape)", "delta = filled(torch.kron(right.contiguous(), left), weight.shape)", "adapters references", "adapters/test_kinds.py adapters/test_lokr.py"),
    Fault("OFT: a block that is not skew", "        skew = skew - skew.mT\n", "        skew = skew + skew.mT\n", "adapters references", "adapters/test_rotations.py"),
    Fault("OFT: a block that is not skew", "    return blocks - blocks.mT\n", "    return blocks + blocks.mT\n", "adapters references", "adapters/test_rotations.py"),
    Fault("a scale of rows scales the bias", "target.add_(((1 - factor) * bias).view(-1, *spatial))", "pass", "patching", "patching/test_forward_forms.py patching/test_forward_program.py patching/test_norms.py patching/test_forward_steps.py"),
    Fault("a scale of rows scales the bias", "shift = (1 - factor) * bias.float()", "shift = 0 * bias.float()", "patching", "patching/test_forward_forms.py patching/test_forward_program.py patching/test_norms.py patching/test_forward_steps.py"),
    Fault("a scale of rows scales the bias in 16 bits", "torch.lerp(target, bias.to(dtype), less, out=target)", "target.addcmul_(target, less, value=-1)", "patching", "patching/test_forward_forms.py patching/test_forward_program.py patching/test_norms.py patching/test_forward_steps.py"),
    Fault("a scale of rows scales the bias where there are gradients", "target.mul_(factor).add_(shift)", "target.mul_(factor)", "patching hosts/plain", "hosts/plain/test_compiled_models.py hosts/plain/test_layers_of_others.py"),
    Fault("the factors' fp16 range is not balanced", "return (up / shift).to(dtype), (down * shift.unsqueeze(1)).to(dtype)", "return up.to(dtype), down.to(dtype)", "patching", "patching/test_bypass.py patching/test_low_rank.py"),
    Fault("on the fly writes into the parameter", "scratch = weight.clone() if shares_storage(weight, parameter) else weight", "scratch = weight", "patching contract", "patching/test_engine.py"),
    Fault("strengths between steps: the other LoRA's", "strength = strengths.get(term.origin, term.strength)", "strength = strengths.get(1 - term.origin, term.strength)", "patching contract", "contract/test_schedules.py"),
    Fault("fused weights: parts in another order", '("img_attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),', '("img_attn.qkv", "attn.to_k", "attn.to_q", "attn.to_v"),', "models references", "models/test_names.py"),
    # Stored weights.
    Fault("NF4: the block's scale is left out", "return values.mul_(absmax.float().unsqueeze(2)).flatten(1)", "return values.flatten(1)", "weights", "weights/test_codecs.py"),
    Fault("bitsandbytes: the scale of a short last block is left out", "values[whole * self.block :].mul_(absmax[whole:])", "pass", "weights", "weights/test_bnb4.py"),
    Fault("GGUF: order of nibbles", "for shift in range(0, 8, bits)], dim)", "for shift in reversed(range(0, 8, bits))], dim)", "weights", "weights/test_codecs.py"),
    Fault("GGUF: Q4_0 has another centre", "return _nibbles(blocks[..., 2:]).float().sub_(8)", "return _nibbles(blocks[..., 2:]).float().sub_(7)", "weights", "weights/test_codecs.py"),
    Fault("fp8: the scale is ignored", "return values.mul_(scale if scale.shape[0] == 1 else scale[start : start + length])", "return values", "weights", "weights/test_codecs.py"),
    # A model is never left half patched.
    Fault("the original is not put back", "        self.access.set_parameter(self.site, original)\n        self._strayed_from, self._is_in_place = None, False\n", "        self._strayed_from, self._is_in_place = None, False\n", "patching", "patching/test_engine.py"),
    Fault("the original is not put back", "            self.state = MergeState.UNKNOWN\n        self.access.set_parameter(self.site, value)\n", "            self.state = MergeState.UNKNOWN\n        if done is MergeState.MERGED:\n            self.access.set_parameter(self.site, value)\n", "patching", "patching/test_engine.py"),
    Fault("the original is not put back", "        self._placed = Placed(value) if done is MergeState.MERGED else None\n        self.access.set_parameter(self.site, value)\n", "        self._placed = Placed(value) if done is MergeState.MERGED else None\n        if done is MergeState.MERGED:\n            self.access.set_parameter(self.site, value)\n", "patching", "patching/test_engine.py"),
    Fault("a merge's original is the earlier merge", "under = old.backup if isinstance(old, MergeAttachment) and old.site.layer is site.layer else None", "under = None", "patching faults", "patching/test_engine.py"),
    Fault("a merge's original is the earlier merge", "        if isinstance(old, MergeAttachment) and old.site.layer is site.layer:\n            backup = old.backup\n", "        if False:\n            backup = old.backup\n", "patching faults", "patching/test_engine.py"),
    Fault("a merge's original is the earlier merge", "        if is_merged(old, site):\n            return old.backup\n", "", "patching faults", "patching/test_engine.py"),
    Fault("all or nothing is broken", "            self.rollback()\n", "            pass\n", "patching faults", "patching/test_transaction.py"),
    Fault("an undo is dropped", "        self._undo.append(undo)\n        change()\n", "        change()\n        self._undo.append(undo)\n", "patching faults", "patching/test_transaction.py"),
    Fault("a failed undo is forgotten", "self.failed.append(undo)", "pass", "patching faults", "patching/test_transaction.py"),
    Fault("all or nothing is broken", "        except BaseException:\n            self._settle()\n            raise\n\n    def _refuse_shared", "        except BaseException:\n            self._state = before\n            raise\n\n    def _refuse_shared", "patching faults", "patching/test_engine.py"),
    Fault("an undo is dropped", "        for old, new in reversed(self.pairs):\n            try:", "        for old, new in reversed(self.pairs[1:]):\n            try:", "patching faults", "patching/test_transaction.py"),
    Fault("a failed undo is forgotten", "                pairs.insert(0, (old, new))\n", "", "patching faults", "patching/test_transaction.py"),
    Fault("a second interrupt leaves a lock taken", "    if not was_held and is_held(lock):\n        lock.release()\n", "    pass\n", ".", "test_locks.py"),
    Fault("an interrupt leaves half of the operators", "        _library._destroy()\n", "        pass\n", "patching", "patching/test_operators.py"),
    # Seen by Pythons below 3.12 alone.
    Fault("a kept property waits for other objects", "if sys.version_info >= (3, 12):\n    from functools import cached_property\nelse:", "if sys.version_info >= (3, 8):\n    from functools import cached_property\nelse:", ".", "test_locks.py"),
    Fault("an interrupt ends the undo", "            except BaseException:\n                continue\n", "            except Exception:\n                continue\n", "hosts", "hosts/plain/test_guard_promises.py"),
    Fault("two threads change a model at once", "        with self._lock:\n            try:\n", "        with contextlib.nullcontext():\n            try:\n", "hosts", "hosts/plain/test_guard_promises.py"),
    Fault("two threads change a model at once", "return while_locked(self._lock, lambda: self._undone_if_it_ends(work))", "return self._undone_if_it_ends(work)", "hosts", "hosts/plain/test_guard_promises.py"),
    Fault("a call looks for the first hook in two steps", "    hooks: list[object] = list(layer._forward_hooks.values())\n    return not hooks or hooks[0] is hook\n", "    return next(iter(layer._forward_hooks.values()), hook) is hook\n", "patching", "patching/test_bypass.py"),
    Fault("a bypass with two hooks goes while a call is in it", "            self._await_calls()\n", "", "patching", "patching/test_bypass.py"),
    Fault("two guards on one weight", "        if found is not None:\n            other, shared = found\n", "        if False:\n            other, shared = found\n", "hosts", "hosts/plain/test_guard_promises.py"),
    Fault("a replaced parameter is not seen", "            return Found.MERGED\n        parameter, original = ", "            return Found.MERGED\n        return Found.MERGED\n        parameter, original = ", "hosts", "hosts/plain/test_guard_promises.py"),
    Fault("values that were loaded in place are not seen", "        if parameter._version != self._version:\n", "        if False:\n", "hosts", "hosts/plain/test_guard_promises.py"),
    Fault("values that were loaded in place are not seen", "        if _version_of(parameter) != self._version:\n", "        if False:\n", "patching hosts", "hosts/plain/test_guard_promises.py"),
    Fault("a wrong checksum among many is not seen", "    if torch.equal(found, own):\n        return []", "    return []", "patching", "patching/test_merging_together.py"),
    Fault("an error's traceback holds what an undo needs the room of", "    finally:\n        values.clear()\n", "    finally:\n        pass\n", "patching", "patching/test_merging_together.py"),
    Fault("the change holds merged values while it is undone", "    merged.clear()\n    try:\n", "    try:\n", "patching", "patching/test_merging_together.py"),
    Fault("an infinite weight among many is not seen", "zip(asked, fine, strict=True) if not is_fine]", "zip(asked, fine, strict=True) if False]", "patching", "patching/test_merging_together.py"),
    Fault("held values go before the answers come", "        infinite, wrong = _infinite(self._merged), _wrong(restored)\n", "        for old, _, _ in restored:\n            old.let_go()\n        infinite, wrong = _infinite(self._merged), _wrong(restored)\n", "patching", "patching/test_merging_together.py"),
    Fault("an undo asks for many at once", "            self._together.close()\n", "            pass\n", "patching", "patching/test_merging_together.py"),
    Fault("the spool's checksum is not looked at", "if checksum != region.checksum:", "if False:", "patching", "patching/test_backup.py patching/test_spool.py"),
    Fault("spool files of living processes are deleted", "if name is not None and not is_running(int(name[1]), int(name[2])):", "if name is not None:", "patching", "patching/test_backup.py patching/test_spool.py"),
    Fault("a hook is restored over another extension", "        if self.is_outermost:\n            setattr(self.owner, self.name, self.original)\n", "        setattr(self.owner, self.name, self.original)\n", "hosts runtime contract", "hosts/test_hooks.py runtime/test_hooks.py"),
    Fault("some hooks stay", "while self.hooks:\n", "while len(self.hooks) > 1:\n", "hosts runtime contract", "hosts/test_hooks.py runtime/test_hooks.py"),
    Fault("after a failure there is no way of the host's", "way = self._own_ways.apply_whole(original, loader, access, wanted, offload)", "way = None", "contract faults", "faults/test_single.py"),
    Fault("after a failure there is no way of the host's", "way = apply_whole(change.host, access, wanted, self._api.weight_classes)", "way = None", "contract faults", "faults/test_single.py"),
    Fault("what a way of the host's did for want of memory is recorded for good", "loader.loaded_hash = RETRY if is_out_of_memory(error) else stack_hash", "loader.loaded_hash = stack_hash", "contract faults hosts", "faults/test_single.py"),
    Fault("what a way of the host's did for want of memory is recorded for good", "if is_out_of_memory(error) or not are_there(change.patches):", "if not are_there(change.patches):", "contract faults hosts", "faults/test_single.py"),
    # What fits.
    Fault("a misfit is ignored", "term.check(shape, may_expand=may_expand)", "pass", "adapters patching", "adapters/test_fitting.py"),
    Fault("a foreign file is accepted", "return model is None or lora is None or model == lora or", "return True or", "models", "models/test_architecture.py"),
    Fault("ranks without an end", "if rank > max(LARGEST_RANK, shape[0], product_of(shape[1:])):", "if False:", "adapters", "adapters/test_hostile_loras.py adapters/test_hostile_factors.py adapters/test_hostile_files.py"),
    Fault("NaN in a file is taken", 'if tensor.is_floating_point() and not math.isfinite(float(wide.sum(dtype=torch.float64))):', "if False:", "adapters", "adapters/test_hostile_loras.py adapters/test_hostile_factors.py adapters/test_hostile_files.py"),
    Fault("NaN in a file is taken", "if tensor.is_floating_point() and not math.isfinite(_sum(tensor)):", "if False:", "adapters", "adapters/test_hostile_factors.py adapters/test_hostile_files.py"),
    Fault("the mode goes by free memory", "if exact and wish is not Wish.ON_THE_FLY and pays(terms, facts.one_token):", 'if exact and wish is not Wish.ON_THE_FLY and __import__("psutil").virtual_memory().available > 1 << 45:', "planning patching", "planning/test_mode.py"),
    Fault("the mode goes by free memory", "if exact and wish is not Wish.ON_THE_FLY and pays(forms, facts.one_token):", 'if exact and wish is not Wish.ON_THE_FLY and __import__("psutil").virtual_memory().available > 1 << 45:', "planning patching", "planning/test_mode.py"),
    # Files.
    Fault("a header's bounds are not checked", '    if needed > size:\n        raise refusal(path, Message("file.too_short", {"wanted": needed, "found": size}))\n', "", "files", "files/test_hostile.py"),
    Fault("tensors may overlap", "if previous is not None and entry.start < previous.start + previous.bytes:", "if False:", "files", "files/test_hostile.py"),
    Fault("a key twice is accepted", "            if key in seen:\n", "            if False:\n", "files", "files/test_hostile.py"),
    Fault("a file that changes while it is read", "if header.state not in (None, FileState.of(facts)):", "if False:", "files", "files/test_safetensors_file.py"),
    Fault("a file that was rewritten comes from the cache", "key = (str(path), status.st_mtime_ns, status.st_size)", "key = (str(path), 0, 0)", "hosts runtime contract", "contract/test_files.py"),
    Fault("a file that was rewritten comes from the cache", "        key = (str(path), state)\n", "        key = (str(path), None)\n", "hosts runtime contract", "contract/test_files.py contract/test_networks.py"),
    Fault("a failed save leaves its partial file", "        partial.unlink(missing_ok=True)\n        raise\n", "        raise\n", "files", "files/test_safetensors_writer.py"),
    Fault("a terminal's control characters are shown", '...{text[-(limit - 3 - head) :]}"\n    return "".join(c if c.isprintable() else "?" for c in text)', '...{text[-(limit - 3 - head) :]}"\n    return text', "files reporting", "files/test_hostile.py"),
    # Memory.
    Fault("the estimate leaves the factors out", "    return need_bytes + factor_bytes, Finding", "    return need_bytes, Finding", "memory hosts runtime", "memory/test_rules.py"),
    Fault("a rule forwards more than the device has", 'return total_bytes, Finding("LG-R02"', 'return asked, Finding("LG-R02"', "memory hosts runtime", "memory/test_rules.py"),
    Fault("Forge's sentinel is taken for a size", "if asked >= EVERYTHING_BYTES:", "if False:", "memory hosts runtime", "memory/test_rules.py"),
    Fault("RAM is not looked at", "    if needed_bytes > alive_bytes:\n", "    if False:\n", "memory hosts runtime", "memory/test_rules.py"),
    Fault("a control group's limit is not seen", "limit - usage + _statistic(self.folder", "(1 << 60) + _statistic(self.folder", "memory", "memory/test_control_groups.py"),
    Fault("NVML is believed less than the driver", "if driver is None or (nvml is not None and driver - nvml > DISAGREEMENT_BYTES):", "if driver is None:", "memory", "memory/test_readings.py"),
    Fault("room is made twice", "        short -= wanted\n", "        pass\n", "planning hosts runtime", "planning/test_eviction.py"),
    Fault("VAE tiles are off", "self._memory.VAE_ALWAYS_TILED = True", "self._memory.VAE_ALWAYS_TILED = False", "hosts runtime", "hosts/test_forge_vae.py hosts/forge/test_vae.py"),
    Fault("a correction has no bounds", "return min(max(worst, math.ceil(LOWEST * predicted)), math.floor(HIGHEST * predicted))", "return worst", "memory", "memory/test_calibration.py"),
    Fault("corrections are kept without an end", "for name in list(entries)[: max(0, len(entries) - LARGEST_ENTRIES)]:", "for name in []:", "memory", "memory/test_calibration.py"),
    Fault("a slow step is not told", "if known.said or not certain:", "if True:", "memory", "memory/test_step_times.py"),
    Fault("a slow step is not told", "if history.reported or not certain:", "if True:", "memory", "memory/test_step_times.py"),
    Fault("plan counts the factors twice", "factors = sum(patch.guard.resident_bytes for patch in carried if patch.in_denoiser)", "factors = 2 * sum(patch.guard.resident_bytes for patch in carried if patch.in_denoiser)", "planning test_cli.py", "planning/test_predict.py"),
    # What is said, and to whom.
    Fault("a phase is never closed", "                self._open.remove(begun)\n", "                pass\n", "recorder reporting hosts runtime", "reporting/test_flight_recorder.py recorder/test_flight_recorder.py"),
    Fault("the crash report has the reason wrong", "return None if alive is None else alive < crash.plan.get(RAM_NEED, 0) + LEAST_LEFT_BYTES", "return None if alive is None else alive > crash.plan.get(RAM_NEED, 0) + LEAST_LEFT_BYTES", "recorder reporting", "reporting/test_crash_report.py recorder/test_crash_report.py"),
    Fault("a precaution of another model's", 'after if same else after - {Precaution.NO_MERGE}', "after", "recorder reporting hosts runtime", "reporting/test_crash_report.py recorder/test_crash_report.py"),
    Fault("a placeholder is missing in Chinese", "{key} 应只有一个值，实际有 {count} 个；文件已损坏", "{key} 应只有一个值；文件已损坏", "messages reporting", "reporting/test_catalogue.py messages/test_catalogue.py"),
    Fault("log lines without an end", "while len(self._lines) > self._capacity_lines or (", "while False and (", "reporting", "reporting/test_ring.py"),
    Fault("the panel answers other sites", '_SAME_SITE = (None, "same-origin", "none")', '_SAME_SITE = (None, "same-origin", "none", "cross-site", "same-site")', "ui", "ui/test_route.py"),
    Fault("the panel answers other sites", "_SAME_SITE = (\"same-origin\", \"none\")", "_SAME_SITE = (\"same-origin\", \"none\", \"cross-site\", \"same-site\")", "ui", "ui/test_access.py ui/test_route.py"),
    Fault("the panel answers without a login", "return dependency(request) is not None", "return True", "ui", "ui/test_route.py"),
    Fault("the page asks while it is hidden", "return this.inView && !document.hidden && !this.paused;", "return !this.paused;", "ui", "ui/test_browser.py"),
    Fault("names are markup in the page", "element.append(...children.filter((child) => child !== null));", "for (const c of children.filter((child) => child !== null)) typeof c === 'string' ? element.insertAdjacentHTML('beforeend', c) : element.append(c);", "ui", "ui/test_browser.py"),
    # In Forge.
    Fault("every unload request is passed on", "has_changed=self._settings() != last", "has_changed=True", "hosts runtime", "hosts/test_forge_unload.py hosts/webui/test_unload.py"),
    Fault("the prompt's key has no strength", "return strength, strength_model, offset, self._numbers.of(value)", "return offset, self._numbers.of(value)", "hosts runtime", "hosts/test_conds.py hosts/webui/test_conditioning.py"),
    Fault("a remembered prompt is handed out itself", "lambda t: t.to(self._devices[id(t)], copy=True)", "lambda t: t.to(self._devices[id(t)])", "hosts runtime", "hosts/test_conds.py hosts/webui/test_conditioning.py"),
    Fault("a prompt with other blanks is taken without asking the tokenizers", " and is_same(kept.spelling.texts)", "", "hosts runtime", "hosts/webui/test_conditioning.py"),
    Fault("what the image after an unload encodes is lost", "                setattr(image, name, cache)\n", "                pass\n", "hosts", "hosts/webui/test_conditioning.py"),
    Fault("a detailer's prompt is any image's", "return all(id(cache) in shared for cache in caches)", "return True", "hosts", "hosts/webui/test_conditioning.py"),
    Fault("emptied caches leave what is remembered", "return not before <= self._filled", "return False", "hosts", "hosts/webui/test_conditioning.py"),
    Fault("a cache that was never filled empties the others", "return not before <= self._filled", "return len(self._filled) < 2", "hosts", "hosts/webui/test_conditioning.py"),
    Fault("an empty negative prompt is one of blanks", 'return text == "", ', "return False, ", "hosts runtime", "hosts/webui/test_prompt_tokens.py"),
    Fault("schedules are off by one step", "return step / (steps - 2)", "return step / (steps - 1)", "planning", "planning/test_schedule.py"),
    Fault("after sampling the last step's strengths stay", "                self._bring(patcher, {})\n", "                pass\n", "contract", "contract/test_schedules.py"),
    Fault("after sampling the last step's strengths stay", "                self.set(patcher, {})\n", "                pass\n", "contract", "contract/test_schedules.py"),
    Fault("after sampling the last step's strengths stay", "            if patcher is not None and AppliedStack(loader).is_current(changed.identifiers):\n                self.set(patcher, {})\n", "            if patcher is not None and AppliedStack(loader).is_current(changed.identifiers):\n                pass\n", "contract", "contract/test_schedules.py"),
    Fault("after sampling the last step's strengths stay in Neo", "            if patcher is not None:\n                self.set(patcher, {})\n            elif stack is not None:\n", "            if patcher is not None:\n                pass\n            elif stack is not None:\n", "hosts/neo contract_neo", "contract_neo/test_strengths.py"),
    Fault("a saved state has no LoRA", "merged = merge(source, self._attachment.terms, device=", "merged = merge(source, (), device=", "patching contract", "patching/test_merged_state.py"),
    Fault("a host that does not fit is taken over", 'attribute(operations, "merge_lora_to_weight") is not lora.merge_lora_to_weight:', 'attribute(operations, "merge_lora_to_weight") is None:', "hosts runtime", "hosts/test_forge_start.py hosts/test_start.py"),
    Fault("the flag to switch off is ignored", "    if off:\n", "    if False:\n", "hosts runtime", "hosts/test_forge_start.py hosts/test_start.py"),
    Fault("another default of a setting", "mode: LoraMode = LoraMode.AUTOMATIC", "mode: LoraMode = LoraMode.MERGE", "ui hosts", "hosts/test_options.py hosts/webui/test_options.py ui/test_settings_section.py"),
    # Commands.
    Fault("bake rounds twice", "            result, beyond = rounded(merged, dtype)\n", "            result, beyond = rounded(merged.bfloat16().to(merged.dtype), dtype)\n", "baking", "baking/test_bake.py"),
    Fault("bake replaces a file unasked", "    if not force:\n        raise LoraGuardError", "    if False:\n        raise LoraGuardError", "baking", "baking/test_command.py"),
    Fault("an error ends with 0", "or type(error).__name__}\", file=sys.stderr)\n        return 1\n", "or type(error).__name__}\", file=sys.stderr)\n        return 0\n", "test_cli.py demo baking", "demo/test_demo.py"),
    # Other clients, other programs, other users.
    Fault("an image's mode changes while it is made", "        self._images.append(latched)\n", "", "hosts runtime", "hosts/forge/test_one_mode.py"),
    Fault("a request's own mode is not that of its image", "(own if name in own else outer)", "outer", "hosts runtime", "hosts/forge/test_one_mode.py"),
    Fault("a pipe is opened for a file", "    if found is not None:\n        raise OSError(Message(\"private.no_file\"", "    if False:\n        raise OSError(Message(\"private.no_file\"", "runtime", "test_private_files.py"),
    Fault("a link is written through", '(0 if mode == "rb" else _flags("O_NOFOLLOW"))', "0", "runtime", "test_private_files.py"),
    Fault("others may read what the guard keeps", "_FILE_MODE, _FOLDER_MODE, _OTHERS = 0o600, 0o700, 0o077", "_FILE_MODE, _FOLDER_MODE, _OTHERS = 0o644, 0o755, 0", "runtime", "test_private_files.py"),
    Fault("what is told of a death takes a foreign thing away", "        if crash is None or other_than_file(told) is not None:\n", "        if crash is None:\n", "runtime recorder", "runtime/test_data_folder.py"),
    Fault("bake replaces what appears meanwhile", "        if replaces:\n            _replace(", "        if True:\n            _replace(", "files baking", "files/test_safetensors_writer.py"),
    Fault("bake removes what a living bake writes", "name[3] != _system() or is_running(int(name[1]), int(name[2])):", "name[3] != _system():", "baking", "baking/test_unfinished.py"),
    Fault("bake names the hash of other bytes", "    return read_unchanged(path, both)\n", "    return both()\n", "baking", "baking/test_command.py"),
    Fault("a full disk is an error without a name", "    if error.errno in _FULL:\n", "    if False:\n", "files", "files/test_safetensors_writer.py"),
    Fault("a text is taken for a strength", "if not isinstance(strength, (bool, str, bytes)):", "if True:", "hosts", "hosts/plain/test_stack_argument.py"),
    Fault("scales of any shape are multiplied", "        if scale.numel() != 1 and scale.shape != ", "        if False and scale.shape != ", "hosts", "hosts/plain/test_stored_weights.py"),
    Fault("the short way of a bypass is 5 % off", "addmm_(activation, block.outputs[0].up.t(), alpha=scale.alpha)", "addmm_(activation, block.outputs[0].up.t(), alpha=1.05 * scale.alpha)", "patching", "patching/test_at_once.py"),
    Fault("a weight of one slice is merged as many are", "if is_here and (merged := _merge_at_once(data, first[0][2], out_dtype)) is not None:\n", "if is_here and (merged := None) is not None:\n", "patching", "patching/test_merging.py"),
    Fault("products of 16-bit factors go without the LoRA's scale", "change, alpha = self._mm(up, down, out_dtype=torch.float32), term.strength * adapter.scale", "change, alpha = self._mm(up, down, out_dtype=torch.float32), term.strength", "patching", "patching/test_wide_product.py"),
    Fault("of several products the last one stays alone", "total = torch.add(total, change, alpha=alpha, out=total if place else change)", "torch.add(total, change, alpha=alpha)", "patching", "patching/test_wide_product.py"),
    Fault("each of several products takes memory of its own", "alpha=alpha, out=total if place else change)", "alpha=alpha)", "patching", "patching/test_wide_product.py"),
    Fault("a product may sum in fp16", " or adapter.down.dtype is not dtype or _sums_in_fp16(dtype):", " or adapter.down.dtype is not dtype:", "patching", "patching/test_wide_product.py"),
    Fault("a part of the rows is taken for all", "if term.part is not None or term.function is not None or term.strength_model != 1.0:", "if term.function is not None or term.strength_model != 1.0:", "patching", "patching/test_wide_product.py"),
    Fault("a norm that overflows counts as infinite", "        found[place] = is_finite(tensors[place])\n", "        found[place] = False\n", "patching", "patching/test_merging.py"),
    Fault("a merged value that is infinite is kept", "            doubtful += [place for place, is_fine in zip(mine, fine, strict=True) if not is_fine]\n", "            pass\n", "patching", "patching/test_merging.py patching/test_merging_together.py"),
    Fault("the answers are those of other tensors", "for place, is_fine in zip(mine, fine, strict=True)", "for place, is_fine in zip(reversed(mine), fine, strict=True)", "patching", "patching/test_merging.py"),
    Fault("a merge at once makes another library's tensor", " and type(data) is torch.Tensor\n    if is_here", "\n    if is_here", "patching", "patching/test_merging.py"),
    Fault("a merge at once changes the original", "        return data.to(dtype, copy=True, memory_format=torch.contiguous_format)\n", "        return data.to(dtype, memory_format=torch.contiguous_format)\n", "patching", "patching/test_merging.py"),
    Fault("a copy out of the ring has the first span's bytes alone", "            first.memory = self._view(first.start, end)\n", "            first.memory = self._view(first.start, first.end)\n", "patching", "patching/test_ring_memory.py"),
    Fault("a copy out of the ring waits for nobody", "or not task.is_done:\n", "or False:\n", "patching", "patching/test_file_reader.py"),
    Fault("what runs outside inference mode may leave gradients on", "if not (torch.is_inference_mode_enabled() or torch.is_grad_enabled()):", "if not torch.is_inference_mode_enabled():", "patching", "test_outside_inference.py"),
    # Copies in RAM.
    Fault("a layer that was changed on the card leaves by its old copy", "return found is not None and bool(found == kept.checksum)", "return found is not None", "runtime", "runtime/test_ram_copies.py"),
    Fault("all of RAM is pinned", "min(memory.total * SHARE_OF_RAM - self.bytes, memory.available - LEAST_LEFT_BYTES)", "memory.available", "runtime", "runtime/test_ram_copies.py"),
    Fault("pinned RAM outlives its layer", "weakref.finalize(layer, self.release).atexit = False", "pass", "runtime", "runtime/test_ram_copies.py"),
    Fault("what leaves for a text encoder is pinned in Neo", "if self._comes_text_encoder or patcher.load_device", "if patcher.load_device", "hosts/neo", "hosts/neo/test_swapped.py"),
    Fault("what leaves for a text encoder is pinned in Neo", "if self._comes_text_encoder or not is_called_often:", "if not is_called_often:", "hosts/neo", "hosts/neo/test_swapped.py"),
    # Swapped weights one layer ahead, and what leaves for nothing.
    Fault("a copy ahead is not waited for", "        begun.main.wait_event(begun.done)\n", "", "patching", "patching/test_swapped_ahead.py patching/test_fused.py"),
    Fault("a copy ahead begins while its memory is in use", "            side.wait_event(done)\n", "", "patching", "patching/test_swapped_ahead.py patching/test_fused.py"),
    Fault("what comes after a copy ahead goes to its stream", "            finally:\n                torch.cuda.set_stream(main)\n", "            finally:\n                pass\n", "patching", "patching/test_swapped_ahead.py"),
    Fault("the copy of another weight is taken", "if is_here and upcoming.layer() is layer and _are_same(upcoming.tensors, tensors):", "if is_here:", "patching", "patching/test_swapped_ahead.py patching/test_fused.py"),
    Fault("a second copy is begun without room", "if ahead and ahead + _bytes(tensors) > self._spare_bytes:", "if False:", "patching", "patching/test_swapped_ahead.py"),
    Fault("any layer counts as the first of a step", "        model, self._model = None if self._model is None else self._model(), None\n", "        model = None if self._model is None else self._model()\n", "patching", "patching/test_swapped_ahead.py"),
    Fault("a step leaves what was begun for another", "        self._leave_begun()\n        self._called.clear()\n        self._last, self._model = None, weakref", "        self._called.clear()\n        self._last, self._model = None, weakref", "patching", "patching/test_swapped_ahead.py"),
    Fault("what is called after a step counts as a part of it", "            self._firsts.pop(model, None)\n        self._last = None\n", "            self._firsts.pop(model, None)\n", "patching", "patching/test_swapped_ahead.py"),
    Fault("what came with a step for nothing comes with each", "            self._firsts.pop(model, None)\n", "            pass\n", "patching", "patching/test_swapped_ahead.py"),
    Fault("a step leaves what it began", "                AHEAD.step_ends()\n", "                pass\n", "runtime", "runtime/test_step_timer.py"),
    Fault("the first layer waits for its copy", "            AHEAD.step_begins(model)\n", "", "runtime", "runtime/test_step_timer.py"),
    Fault("a patch of a file that is still read has any values", "        self.wait()\n        return tuple(super()", "        return tuple(super()", "adapters", "adapters/test_patch_tuples.py"),
    Fault("a file that failed is applied", "        why = _failure(patches)\n", "        why = None\n", "hosts/forge", "contract/test_files_that_follow.py"),
    Fault("a file that failed counts as applied", "is_as_wished) or not are_there(change.patches)", "is_as_wished)", "hosts/forge", "contract/test_files_that_follow.py"),
    Fault("Forge looks into the patches of a file that failed", " and are_there(patches)", "", "hosts/forge", "contract/test_files_that_follow.py"),
    Fault("schedules end beside a file that failed", " and not self._lacks_only_files(patcher)", "", "hosts/forge", "contract/test_files_that_follow.py"),
    Fault("after a schedule a file that failed counts as applied", "                if not are_there(patcher.lora_patches):\n                    AppliedStack(loader).invalidate()\n", "", "hosts/forge", "contract/test_files_that_follow.py"),
    Fault("after Forge's own way a file that failed counts as applied", "if is_out_of_memory(error) or not are_there(change.patches):", "if is_out_of_memory(error):", "hosts/forge", "contract/test_files_that_follow.py"),
    Fault("the error of a file keeps the image that asked for it", "                    one.__traceback__ = None\n", "                    pass\n", "hosts/forge", "contract/test_files_that_follow.py"),
    Fault("what is begun for nothing is begun in each step", "            self._after.pop(before, None)\n", "            pass\n", "patching", "patching/test_swapped_ahead.py patching/test_fused.py"),
    Fault("where memory ends the copy ahead stays", "    AHEAD.give_way()\n", "", "patching", "patching/test_swapped_ahead.py patching/test_fused.py"),
    Fault("the end of an image leaves a copy ahead", "                AHEAD.drop()\n", "                pass\n", "patching", "patching/test_swapped_ahead.py patching/test_fused.py"),
    Fault("memory that the card still reads is written again", "self.is_back and (self.read is None or bool(self.read.query()))", "self.is_back", "patching", "patching/test_ring_memory.py"),
    Fault("the end of the ring runs into its beginning", "return end if end + size_bytes <= first.start else None", "return end", "patching", "patching/test_ring_memory.py"),
    Fault("a small part is read to the place of its neighbour", "        place += piece.bytes\n\n\ndef loads", "\n\ndef loads", "patching", "patching/test_file_backup.py"),
    Fault("one weight that differs refuses all of its size", ".view(len(group), -1).any(1)", ".any().expand(len(group))", "patching", "patching/test_file_backup.py"),
    Fault("what was read of a group stays while it is summed", "            del there\n", "", "patching", "patching/test_file_backup.py"),
    Fault("where memory ends no weight is compared alone", "self._prove(parameters, 0)", "self._prove(parameters, BLOCK_BYTES)", "patching", "patching/test_file_backup.py"),
    Fault("the smallest weights say whether the file is another one", "            unknown.sort(key=lambda key: found[key].start)\n", "            unknown.sort(key=lambda key: found[key].bytes)\n", "patching", "patching/test_file_backup.py"),
    Fault("weights with a rest behind their last row are summed together", "size > 0 and size % (row_words(size) * 8) == 0", "size > 0", "patching", "patching/test_file_backup.py"),
    Fault("ordinary RAM counts as pinned", "            if self._pinned[layer].holds(one.data)\n", "", "runtime", "runtime/test_ram_copies.py"),
    Fault("what the host places counts as pinned", "min(max(0, come - state.placed_by_host_bytes), state.pinned_bytes)", "min(come, state.pinned_bytes)", "planning", "planning/test_job_cost.py"),
    Fault("factors leave at each change of a strength", " or not self._stacks.takes_off(patcher)", "", "hosts/forge", "hosts/forge/test_lora_loading.py"),
    Fault("a text encoder that comes back in part keeps no copy", "before = self._copies.before_card(layer, returns)", "before = self._copies.before_card(layer)", "hosts/forge", "hosts/forge/test_ram_copies.py"),
]  # fmt: skip


def searched_files(root: Path) -> list[Path]:
    """The files of the product in `root` that a fault's text may stand in."""
    tops = [root / name for name in SEARCHED]
    inside = [path for top in tops for path in top.rglob("*") if path.suffix in (".py", ".js")]
    return inside + [top for top in tops if top.is_file()]


class Tree:
    """A copy of the project that faults are planted in."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            if (root / name).is_dir():
                shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in root.iterdir():
            if path.is_file():
                shutil.copy(path, folder)

    def place_of(self, fault: Fault) -> Path | None:
        """The one file that has the text; None where none or several have it."""
        paths = searched_files(self.folder)
        found = [path for path in paths for _ in range(path.read_text(encoding="utf-8").count(fault.right))]
        return found[0] if len(found) == 1 else None

    def failed_tests(self, targets: list[str], *options: str) -> list[str]:
        """Which of the tests fail; stops at the first unless told otherwise."""
        targets = [target for target in targets if (self.folder / target.partition("::")[0]).exists()]
        if not targets:
            return []
        # What a test starts has to find the copy too.
        env = {**os.environ, "PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        how = ("-q", "-p", "no:cacheprovider", "-rfE", "--tb=no")
        shown = warm.run(PYTEST, *how, *options, *targets, env=env, cwd=self.folder)
        found = FAILED.findall(shown.stdout)
        if shown.returncode not in (0, 1, 5) and not found:
            raise RuntimeError(shown.stdout[-2000:] + shown.stderr[-2000:])
        return found


def catch(tree: Tree, fault: Fault, path: Path) -> str | None:
    """The first test that sees the fault and passes without it; None where there is none."""
    right = path.read_text(encoding="utf-8")
    for names in (fault.likely, fault.folders):
        targets = [f"tests/{name}" for name in names.split()]
        path.write_text(right.replace(fault.right, fault.wrong), encoding="utf-8")
        try:
            failed = tree.failed_tests(targets, "-x")
        finally:
            path.write_text(right, encoding="utf-8")
        if failed and not tree.failed_tests([failed[0]]):
            return failed[0]
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to try (default: this one)")
    parser.add_argument("--only", default="", help="only faults with this in their name")
    options = parser.parse_args()
    names = [name for name in dict.fromkeys(fault.name for fault in FAULTS) if options.only in name]
    caught = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Tree(options.root.resolve(), Path(folder))
        for name in names:
            started, seen = time.perf_counter(), "its text stands nowhere, or twice"
            for fault in FAULTS:
                if fault.name == name and (path := tree.place_of(fault)) is not None:
                    test = catch(tree, fault, path)
                    seen = test or "NOT CAUGHT"
                    caught += test is not None
                    break
            print(f"{name:60} {time.perf_counter() - started:6.1f} s  {seen}", flush=True)
    print(f"{caught} of {len(names)} faults caught")
    return 0 if caught == len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
