// The present state in the tab "LoRA Guard": memory, LoRAs, settings. Each part is redrawn only when it has changed: memory
// changes all the time, and parts that the user has opened, selected or scrolled elsewhere must stay.
(function () {
    "use strict";

    const guard = (window.loraGuard = window.loraGuard || {});
    const COLUMNS = ["lora", "base", "rank", "size", "strength", "share", "cost"];

    guard.Status = class {
        constructor(label, tips) {
            const { make } = guard;
            this.label = label;
            this.tips = tips;
            this.drawn = {};
            this.opened = new Set();
            this.facts = make("dl", { class: "lg-facts" });
            this.figures = make("div", { class: "lg-memory" });
            this.numbers = make("tbody", {});
            this.rows = make("div", {});
            const numbers = make("details", { class: "lg-numbers" }, make("summary", { "data-tip": label("tip_numbers") }, label("numbers")),
                make("div", { class: "lg-scroll", tabindex: "0", role: "region", "aria-label": label("numbers") },
                    make("table", { class: "lg-table", "aria-label": label("numbers") }, this.numbers)));
            this.loras = this.section("loras", this.rows);
            this.memory = this.section("memory", this.figures, numbers);
            this.inForce = this.section("in_force", this.facts);
        }

        show(status) {
            this.draw("force", this.facts, [status.mode, status.allocator, status.version], () => this.force(status));
            this.draw("memory", this.figures, [status.memory, status.step, status.programs], () => this.amounts(status));
            this.draw("numbers", this.numbers, status.memory.map((figure) => figure.numbers), (all) =>
                all.flat().map((amount) => this.number(amount)));
            this.draw("loras", this.rows, [status.loras, status.models], () => this.inUse(status));
        }

        draw(name, place, told, children) {
            const text = JSON.stringify(told);
            if (text === this.drawn[name]) return;
            this.drawn[name] = text;
            this.tips.redraw(place, children(told));
        }

        section(name, ...children) {
            const { make } = guard;
            return make("section", { class: "lg-section-" + name, "aria-label": this.label(name) }, make("h3", {}, this.label(name)), ...children);
        }

        // -- settings

        force(status) {
            const { make, term } = guard;
            const of = (name, values) => [make("dt", {}, term(this.label(name), this.label("tip_" + name))), ...values.map((value) => make("dd", {}, value))];
            return [...of("mode", [status.mode]), ...(status.allocator.length ? of("allocator", status.allocator) : [])];
        }

        // -- memory

        amounts(status) {
            const shown = status.memory.map((figure, place) => this.figure(figure, place ? "ram" : "vram"));
            if (status.step) shown.push(this.step(status.step));
            if (status.programs) shown.push(this.programs(status.programs));
            return shown;
        }

        figure(figure, kind) {
            const { make, term, fill, size } = guard;
            const name = make("span", { class: "lg-figure-name" }, term(figure.name, this.label("tip_" + kind)));
            if (figure.total_mb === null || figure.missing !== null) {
                return make("div", { class: "lg-figure" }, name, make("span", { class: "lg-none" }, this.label("none")),
                    make("span", { class: "lg-source" }, figure.missing));
            }
            const used_mb = figure.total_mb - figure.free_mb, total = size(figure.total_mb);
            const used = fill(this.label("used_of"), { used: size(used_mb), total });
            const free = fill(this.label("free"), { free: size(figure.free_mb), total });
            const share = (mb) => (figure.total_mb ? Math.max(0, Math.min(100, (100 * mb) / figure.total_mb)) : 0).toFixed(1) + "%";
            const parts = figure.used.map((amount) => amount.name + " " + size(amount.mb)).join(this.label("between"));
            const bar = make("span", {
                class: "lg-bar", role: "meter", tabindex: "0", "data-tip": used + this.label("colon") + parts, "aria-label": figure.name, "aria-valuemin": "0",
                "aria-valuemax": String(figure.total_mb), "aria-valuenow": String(used_mb), "aria-valuetext": used,
            }, ...figure.used.map((amount, place) => {
                const part = make("span", { class: "lg-bar-used lg-part-" + place });
                part.style.width = share(amount.mb);
                return part;
            }));
            const legend = make("span", { class: "lg-legend" },
                ...figure.used.map((amount, place) => this.amount(amount, "lg-key lg-part-" + place)),
                ...figure.beside.map((amount) => this.amount(amount, null)));
            return make("div", { class: "lg-figure" }, name, bar, term(free, used, { class: "lg-term lg-free" }),
                legend, make("span", { class: "lg-source" }, figure.source));
        }

        /** Shows a name with its size. The tooltip has its meaning and its origin, or why it is not known. */
        amount(amount, key) {
            const { make, term, size } = guard;
            const mark = key ? make("span", { class: key, "aria-hidden": "true" }) : null;
            const tip = this.explained(amount);
            return make("span", { class: "lg-amount" }, mark, tip ? term(amount.name, tip) : amount.name, " ",
                make("span", { class: "lg-number" }, amount.mb === 0 ? this.label("none") : size(amount.mb)));
        }

        explained(amount) {
            const about = amount.about || "";
            if (amount.missing) return guard.fill(this.label("tip_missing"), { about, reason: amount.missing }).trim();
            return amount.source ? guard.fill(this.label("tip_sourced"), { about, source: amount.source }).trim() : about;
        }

        step(step) {
            const { make, fill, size } = guard;
            const title = fill(this.label("step"), { model: step.model, size: size(step.mb) });
            const parts = step.parts.flatMap((amount, place) => [place ? " + " : "", this.amount(amount, null)]);
            const copied = fill(this.label("swapped"), { size: size(step.copied_mb) });
            return make("p", { class: "lg-step" }, title + " ", ...parts,
                step.copied_mb >= 1 ? make("span", { class: "lg-copied" }, copied) : null);
        }

        programs(programs) {
            const { make, fill, size } = guard;
            const names = programs.largest.map((one) => (one.mb === null ? one.name : one.name + " " + size(one.mb)));
            const list = names.join(this.label("between")) + (programs.more ? this.label("and_others") : "");
            return make("p", { class: "lg-programs" }, fill(this.label("programs"), { size: size(programs.mb), programs: list }));
        }

        number(amount) {
            const { make, fill, size } = guard;
            const known = amount.mb !== null;
            const value = known ? size(amount.mb) : fill(this.label("not_known"), { reason: amount.missing });
            return make("tr", {}, make("th", { scope: "row" }, amount.name),
                make("td", known ? { class: "lg-number" } : { class: "lg-quiet", colspan: "2" }, value),
                known ? make("td", { class: "lg-quiet" }, amount.source) : null);
        }

        // -- LoRAs

        inUse(status) {
            const { make, term } = guard;
            if (!status.loras.length) return [make("p", { class: "lg-quiet" }, this.label("nothing"))];
            const titles = COLUMNS.map((name) => make("th", { scope: "col" },
                term(this.label(name), this.label("tip_" + name))));
            return [make("table", { class: "lg-table lg-loras", "aria-label": this.label("loras") },
                make("thead", {}, make("tr", {}, ...titles)),
                ...status.loras.map((lora) => this.lora(lora, status.models)))];
        }

        /** The row of a file, and below it the folded details. */
        lora(lora, models) {
            const { make, size, duration, fill } = guard;
            const cell = (title, ...children) => make("td", { class: "lg-number", "data-title": this.label(title) }, ...children);
            const open = this.opened.has(lora.name);
            const button = make("button", { type: "button", class: "lg-fold", "aria-expanded": String(open), "data-file": lora.name }, make("bdi", {}, lora.name));
            const name = make("th", { scope: "row" }, button);
            const details = make("tr", { class: "lg-details" }, make("td", { colspan: String(COLUMNS.length) }, ...this.details(lora, models)));
            details.hidden = !open;
            button.addEventListener("click", () => {
                details.hidden = !details.hidden;
                button.setAttribute("aria-expanded", String(!details.hidden));
                if (details.hidden) this.opened.delete(lora.name);
                else this.opened.add(lora.name);
            });
            const about = [
                cell("base", lora.base === null ? "?" : lora.base),
                cell("rank", lora.ranks.length ? lora.ranks.join(this.label("between")) : "–"),
                cell("size", size(lora.file_mb)),
            ];
            if (lora.refused !== null) {
                const why = make("td", { class: "lg-why-not", colspan: "3" }, fill(this.label("not_applied"), { reason: lora.refused }));
                return make("tbody", { class: "lg-refused" }, make("tr", {}, name, ...about, why), details);
            }
            const strengths = lora.strengths.map((one) => (one === null ? "?" : String(one)));
            return make("tbody", {}, make("tr", {}, name, ...about,
                cell("strength", strengths.join(" / ")),
                cell("share", lora.share === null ? "?" : this.percent(lora.share)),
                cell("cost", size(lora.cost_mb) + " · " + duration(lora.cost_ms))), details);
        }

        percent(share) {
            // Never 100 % for less than all, nor 0 % for a part.
            const whole = Math.round(100 * share);
            return (share > 0 && share < 1 ? Math.max(1, Math.min(99, whole)) : whole) + " %";
        }

        details(lora, models) {
            const { make, term, fill, size, duration } = guard;
            const lines = lora.kinds.length ? [make("p", {}, term(this.label("kind"), this.label("tip_kind")), this.label("colon"), lora.kinds.join(this.label("between")))] : [];
            for (const one of lora.models) {
                const title = fill(this.label("on_model"), { model: one.name, strength: one.strength === null ? "?" : String(one.strength) });
                const facts = [fill(this.label("used"), { used: one.used }), ...(one.skipped ? [fill(this.label("skipped"), { skipped: one.skipped })] : [])];
                lines.push(make("p", {}, make("strong", {}, title), this.label("colon") + facts.join(this.label("between"))));
                if (one.refused) lines.push(make("p", { class: "lg-refused" }, fill(this.label("not_applied"), { reason: one.refused })));
                if (one.lost) lines.push(make("p", { class: "lg-lost" }, fill(this.label("lost"), { count: one.lost })));
                if (one.modes.length) lines.push(make("ul", {}, ...one.modes.map((mode) => make("li", {},
                    mode.way ? term(mode.text, this.label("tip_way_" + mode.way)) : mode.text,
                    mode.why ? make("span", { class: "lg-quiet" }, " (" + mode.why + ")") : null))));
            }
            for (const model of models.filter((one) => lora.models.some((on) => on.name === one.name))) {
                lines.push(make("p", { class: "lg-quiet" }, fill(this.label("last_change"), {
                    model: model.name, device: model.device, device_mb: size(model.device_mb), ram_mb: size(model.ram_mb), ms: duration(model.milliseconds),
                })));
            }
            return lines;
        }
    };
})();
