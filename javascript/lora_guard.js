// The tab "LoRA Guard". It polls the server only while the tab is visible. All answers are inserted as text, never as HTML:
// names come from files of unknown authors. The labels come from the server too (messages/catalogue/panel.py).
(function () {
    "use strict";

    const PLACE = "lora_guard_panel";
    const ADDRESS = "./lora-guard/panel";
    const EVERY_MS = 1000;
    const BACK_OFF_MS = [1000, 2000, 4000, 8000, 15000];
    const GIVE_UP_MS = 20000;
    const ROWS = 2000;
    const BOTTOM_PX = 8;
    const LEVELS = ["debug", "info", "warning", "error"];

    /** Makes an element with attributes and children; strings become text nodes. */
    function make(tag, attributes, ...children) {
        const element = document.createElement(tag);
        for (const [name, value] of Object.entries(attributes || {})) {
            if (value !== null && value !== undefined) element.setAttribute(name, value);
        }
        element.append(...children.filter((child) => child !== null));
        return element;
    }

    function fill(template, values) {
        return template.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? values[name] : whole));
    }

    function size(mb) {
        if (mb === null) return "?";
        return mb >= 1024 ? (mb / 1024).toFixed(mb >= 10240 ? 1 : 2) + " GB" : mb.toFixed(mb >= 100 ? 0 : 1) + " MB";
    }

    function duration(ms) {
        if (ms === null) return "?";
        return ms >= 1000 ? (ms / 1000).toFixed(2) + " s" : ms.toFixed(1) + " ms";
    }

    function clock(seconds) {
        const time = new Date(seconds * 1000);
        return [time.getHours(), time.getMinutes(), time.getSeconds()].map((n) => String(n).padStart(2, "0")).join(":");
    }

    /** The log: rows by number, a level filter, and a view that follows its end until the reader scrolls up. */
    class Log {
        constructor(label) {
            this.label = label;
            this.rows = new Map();
            this.era = 0;
            this.following = true;
            this.list = make("div", { class: "lg-lines", role: "log", tabindex: "0", "aria-label": label("log"), dir: "ltr" });
            this.newest = make("button", { type: "button", class: "lg-button lg-newest" }, "↓ " + label("newest"));
            this.newest.hidden = true;
            this.box = make("div", { class: "lg-log-box" }, this.list, this.newest);
            this.list.addEventListener("scroll", () => {
                if (!this.list.clientHeight) return;  // hidden, not scrolled
                this.following = this.list.scrollHeight - this.list.scrollTop - this.list.clientHeight <= BOTTOM_PX;
                this.newest.hidden = this.following;
            });
            this.newest.addEventListener("click", () => {
                this.following = true;
                this.toEnd();
                this.list.focus();
            });
        }

        /** Adds lines of the server. A line whose `row` is shown already replaces that row. */
        add(lines) {
            const fresh = document.createDocumentFragment();
            for (const line of lines) {
                const row = this.row(line);
                const number = this.era + ":" + line.row;
                const old = this.rows.get(number);
                if (old) old.replaceWith(row);
                else fresh.append(row);
                this.rows.set(number, row);
            }
            this.list.append(fresh);
            this.trim();
            if (this.following) this.toEnd();
        }

        /** Adds a divider. The server's numbers start anew after it; earlier rows stay. */
        divide(text) {
            this.era += 1;
            const row = make("div", { class: "lg-line lg-divider", "data-level": "error" }, text);
            this.rows.set(this.era + ":", row);
            this.list.append(row);
        }

        row(line) {
            const level = LEVELS.includes(line.level) ? line.level : "error";
            const word = level === "info" ? "" : this.label(level) + ": ";
            return make("div", { class: "lg-line lg-" + level, "data-level": level },
                make("span", { class: "lg-time" }, clock(line.time)), " ",
                make("span", { class: "lg-level" }, word),
                make("span", { class: "lg-text" }, line.text));
        }

        trim() {
            for (const [number, row] of this.rows) {
                if (this.rows.size <= ROWS) break;
                row.remove();
                this.rows.delete(number);
            }
        }

        toEnd() {
            this.list.scrollTop = this.list.scrollHeight;
            this.newest.hidden = true;
        }

        /** Returns the visible lines as text. */
        text() {
            const least = LEVELS.indexOf(this.list.dataset.least || "debug");
            const shown = [...this.list.children].filter((row) => LEVELS.indexOf(row.dataset.level) >= least);
            return shown.map((row) => row.textContent).join("\n") + "\n";
        }

        filter(level) {
            this.list.dataset.least = level;
            if (this.following) this.toEnd();
        }
    }

    /** Loaded models, free memory, active settings. Each part is redrawn only when it has changed: memory changes all the
     * time, and parts that the user has opened, selected or scrolled elsewhere must stay. */
    class Status {
        constructor(label) {
            this.label = label;
            this.drawn = {};
            this.problem = make("div", { class: "lg-slot" });
            this.inForce = make("dl", { class: "lg-facts" });
            this.figures = make("div", { class: "lg-memory" });
            this.numbers = make("tbody", {});
            this.models = make("div", {});
            const numbers = make("details", { class: "lg-numbers" }, make("summary", {}, label("numbers")),
                make("div", { class: "lg-scroll", tabindex: "0", role: "region", "aria-label": label("numbers") },
                    make("table", { class: "lg-table", "aria-label": label("numbers") }, this.numbers)));
            this.element = make("div", { class: "lg-status" }, this.problem,
                this.section(label("in_force"), this.inForce),
                this.section(label("memory"), this.figures, numbers),
                this.section(label("loaded"), this.models));
        }

        show(status) {
            this.draw("problem", this.problem, status.problem, (problem) =>
                problem ? [make("p", { class: "lg-problem", role: "alert" }, problem)] : []);
            this.draw("force", this.inForce, [status.mode, status.allocator], () => this.force(status));
            this.draw("memory", this.figures, [status.memory, status.step, status.programs], () => this.memory(status));
            this.draw("numbers", this.numbers, status.memory.map((figure) => figure.numbers), (all) =>
                all.flat().map((amount) => this.number(amount)));
            this.draw("loaded", this.models, [status.models, status.left_out], () => this.loaded(status));
        }

        draw(name, place, told, children) {
            const text = JSON.stringify(told);
            if (text === this.drawn[name]) return;
            this.drawn[name] = text;
            place.replaceChildren(...children(told));
        }

        section(title, ...children) {
            return make("section", { "aria-label": title }, make("h3", {}, title), ...children);
        }

        force(status) {
            const of = (name, values) => [make("dt", {}, this.label(name)), ...values.map((value) => make("dd", {}, value))];
            return [...of("mode", [status.mode]), ...(status.allocator.length ? of("allocator", status.allocator) : [])];
        }

        memory(status) {
            const shown = status.memory.map((figure) => this.figure(figure));
            if (status.step) shown.push(this.step(status.step));
            if (status.programs) shown.push(this.programs(status.programs));
            return shown;
        }

        figure(figure) {
            const name = make("span", { class: "lg-figure-name" }, figure.name);
            if (figure.total_mb === null || figure.missing !== null) {
                return make("div", { class: "lg-figure" }, name, make("span", { class: "lg-none" }, this.label("none")),
                    make("span", { class: "lg-source" }, figure.missing));
            }
            const used_mb = figure.total_mb - figure.free_mb, total = size(figure.total_mb);
            const used = fill(this.label("used_of"), { used: size(used_mb), total });
            const free = fill(this.label("free"), { free: size(figure.free_mb), total });
            const share = (mb) => (figure.total_mb ? Math.max(0, Math.min(100, (100 * mb) / figure.total_mb)) : 0).toFixed(1) + "%";
            const bar = make("span", {
                class: "lg-bar", role: "meter", "aria-label": figure.name, "aria-valuemin": "0",
                "aria-valuemax": String(figure.total_mb), "aria-valuenow": String(used_mb), "aria-valuetext": used,
            }, ...figure.used.map((amount, place) => {
                const part = make("span", { class: "lg-bar-used lg-part-" + place, title: amount.name + " " + size(amount.mb) });
                part.style.width = share(amount.mb);
                return part;
            }));
            const legend = make("span", { class: "lg-legend" },
                ...figure.used.map((amount, place) => this.amount(amount, "lg-key lg-part-" + place)),
                ...figure.beside.map((amount) => this.amount(amount, null)));
            return make("div", { class: "lg-figure" }, name, bar, make("span", { class: "lg-free", title: used }, free),
                legend, make("span", { class: "lg-source" }, figure.source));
        }

        /** Shows a name with its size. If the size is unknown, the tooltip has the reason. */
        amount(amount, key) {
            const mark = key ? make("span", { class: key, "aria-hidden": "true" }) : null;
            return make("span", { class: "lg-amount", title: amount.missing || amount.source || null }, mark,
                amount.name + " ", make("span", { class: "lg-number" }, amount.mb === 0 ? this.label("none") : size(amount.mb)));
        }

        step(step) {
            const title = fill(this.label("step"), { model: step.model, size: size(step.mb) });
            const parts = step.parts.flatMap((amount, place) => [place ? " + " : "", this.amount(amount, null)]);
            const copied = fill(this.label("swapped"), { size: size(step.copied_mb) });
            return make("p", { class: "lg-step" }, title + " ", ...parts,
                step.copied_mb >= 1 ? make("span", { class: "lg-copied" }, copied) : null);
        }

        programs(programs) {
            const names = programs.largest.map((one) => (one.mb === null ? one.name : one.name + " " + size(one.mb)));
            const list = names.join(this.label("between")) + (programs.more ? this.label("and_others") : "");
            return make("p", { class: "lg-programs" }, fill(this.label("programs"), { size: size(programs.mb), programs: list }));
        }

        number(amount) {
            const known = amount.mb !== null;
            const value = known ? size(amount.mb) : fill(this.label("not_known"), { reason: amount.missing });
            return make("tr", {}, make("th", { scope: "row" }, amount.name),
                make("td", known ? { class: "lg-number" } : { class: "lg-quiet", colspan: "2" }, value),
                known ? make("td", { class: "lg-quiet" }, amount.source) : null);
        }

        loaded(status) {
            const shown = status.models.map((model) => this.model(model));
            if (status.left_out.length) shown.push(make("ul", { class: "lg-left-out" }, ...status.left_out.map((lora) => this.leftOut(lora))));
            if (!shown.length) shown.push(make("p", { class: "lg-quiet" }, this.label("nothing")));
            return shown;
        }

        leftOut(lora) {
            return make("li", { class: "lg-refused" }, make("bdi", {}, lora.name), " ", fill(this.label("not_applied"), { reason: lora.why }));
        }

        model(model) {
            const line = fill(this.label("model_line"), {
                device_mb: size(model.device_mb), device: model.device, ram_mb: size(model.ram_mb), ms: duration(model.milliseconds),
            });
            const head = make("p", { class: "lg-model" }, make("strong", {}, make("bdi", {}, model.name)), " ", make("span", { class: "lg-quiet" }, line));
            if (!model.loras.length) return make("div", { class: "lg-one" }, head, make("p", { class: "lg-quiet" }, this.label("no_lora")));
            const columns = ["lora", "strength", "used", "skipped", "how", "size"];
            const titles = columns.map((name) => make("th", { scope: "col" }, this.label(name)));
            const table = make("table", { class: "lg-table", "aria-label": model.name },
                make("thead", {}, make("tr", {}, ...titles)),
                make("tbody", {}, ...model.loras.map((lora) => this.lora(lora))));
            return make("div", { class: "lg-one" }, head, make("div", { class: "lg-scroll", tabindex: "0", role: "region", "aria-label": model.name }, table));
        }

        lora(lora) {
            const cell = (title, kind, ...children) => make("td", { class: kind, "data-title": this.label(title) }, ...children);
            const name = make("th", { scope: "row" }, make("bdi", {}, lora.name));
            const strength = cell("strength", "lg-number", lora.strength === null ? "?" : String(lora.strength));
            if (lora.refused !== null) {
                const why = fill(this.label("not_applied"), { reason: lora.refused });
                return make("tr", { class: "lg-refused" }, name, strength, make("td", { class: "lg-why", colspan: "4" }, why));
            }
            const how = cell("how", "lg-how", ...lora.modes.map((mode) => make("div", {}, mode.text,
                mode.why ? make("span", { class: "lg-quiet" }, " (" + mode.why + ")") : null)));
            if (lora.lost) how.append(make("div", { class: "lg-lost" }, fill(this.label("lost"), { count: lora.lost })));
            return make("tr", {}, name, strength,
                cell("used", "lg-number", String(lora.used)),
                cell("skipped", "lg-number", String(lora.skipped)),
                how,
                cell("size", "lg-number", size(lora.mb)));
        }
    }

    /** The content of one element of the page, and the polling while it is visible. */
    class Panel {
        constructor(place) {
            this.place = place;
            place.replaceChildren();
            this.boot = "";
            this.language = "";
            this.since = 0;
            this.failures = 0;
            this.paused = false;
            this.inView = false;
            this.timer = null;
            this.request = null;
            this.view = new IntersectionObserver((entries) => {
                this.inView = entries[entries.length - 1].isIntersecting;
                this.wake();
            });
            this.view.observe(place);
            document.addEventListener("visibilitychange", (this.onVisibility = () => this.wake()));
        }

        close() {
            this.view.disconnect();
            document.removeEventListener("visibilitychange", this.onVisibility);
            this.inView = false;
            this.wake();
        }

        get isWatched() {
            return this.inView && !document.hidden && !this.paused;
        }

        /** Starts polling if the panel is visible, else stops it. */
        wake() {
            clearTimeout(this.timer);
            this.timer = null;
            if (!this.isWatched) {
                if (this.request) this.request.abort();
            } else if (!this.request) {
                if (this.log && this.log.following) this.log.toEnd();
                this.ask();
            }
        }

        async ask() {
            const request = (this.request = new AbortController());
            const limit = setTimeout(() => request.abort(), GIVE_UP_MS);
            let wait = EVERY_MS;
            try {
                const query = new URLSearchParams({ since: String(this.since), boot: this.boot, language: this.language });
                const answer = await fetch(ADDRESS + "?" + query, { signal: request.signal, cache: "no-store", credentials: "same-origin" });
                if (!answer.ok) throw Object.assign(new Error("HTTP " + answer.status), { status: answer.status });
                const told = await answer.json();
                this.failures = 0;
                this.take(told);
                if (told.more) wait = 0;
            } catch (error) {
                if (this.isWatched) {
                    wait = BACK_OFF_MS[Math.min(this.failures, BACK_OFF_MS.length - 1)];
                    this.failures += 1;
                    this.state(error.status === 401 || error.status === 403 ? "log_in" : "waiting");
                }
            } finally {
                clearTimeout(limit);
                this.request = null;
                if (this.isWatched) this.timer = setTimeout(() => this.wake(), wait);
            }
        }

        take(told) {
            if (told.labels && this.language !== told.language) this.draw(told.labels);
            else if (told.boot !== this.boot) this.log.divide("—— " + this.label("restarted") + " ——");
            if (!told.known) this.since = 0;
            this.boot = told.boot;
            this.language = told.language;
            if (told.lines.length) {
                this.since = told.lines[told.lines.length - 1].number;
                this.log.add(told.lines);
            }
            this.status.show(told.status);
            this.state("live");
        }

        label(name) {
            return (this.labels && this.labels[name]) || name;
        }

        /** Rebuilds everything in the language of `labels`; keeps the selected level. */
        draw(labels) {
            const least = this.log ? this.log.list.dataset.least : "debug";
            this.labels = labels;
            const label = (name) => this.label(name);
            this.log = new Log(label);
            this.status = new Status(label);
            this.stateText = make("span", { class: "lg-state", role: "status", "data-state": "live" });
            this.levels = make("select", { class: "lg-select", "aria-label": label("level") },
                ...LEVELS.map((level) => make("option", { value: level }, label("level_" + level))));
            this.levels.value = least;
            this.log.filter(least);
            this.levels.addEventListener("change", () => this.log.filter(this.levels.value));
            const button = (name, action) => {
                const made = make("button", { type: "button", class: "lg-button lg-" + name }, label(name));
                made.addEventListener("click", action);
                return made;
            };
            this.pauseButton = button("pause", () => this.pause());
            this.copyButton = button("copy", () => this.copy());
            const tools = make("div", { class: "lg-tools", role: "toolbar", "aria-label": label("log") },
                make("label", { class: "lg-label" }, label("level") + " ", this.levels),
                this.pauseButton, this.copyButton, button("download", () => this.download()), this.stateText);
            const log = make("section", { class: "lg-log", "aria-label": label("log") }, make("h3", {}, label("log")), tools, this.log.box);
            this.place.replaceChildren(this.status.element, log);
        }

        state(name) {
            if (!this.stateText) {
                // There are no labels before the first answer.
                this.place.dataset.state = name;
                return;
            }
            delete this.place.dataset.state;
            if (this.stateText.dataset.state === name && this.stateText.textContent) return;
            this.stateText.dataset.state = name;
            this.stateText.textContent = this.label(name);
        }

        pause() {
            this.paused = !this.paused;
            this.pauseButton.textContent = this.label(this.paused ? "resume" : "pause");
            this.wake();
            this.state(this.paused ? "paused" : "live");
        }

        async copy() {
            const ok = await toClipboard(this.log.text());
            this.copyButton.textContent = this.label(ok ? "copied" : "copy_failed");
            setTimeout(() => { this.copyButton.textContent = this.label("copy"); }, ok ? 1500 : 4000);
        }

        download() {
            const address = URL.createObjectURL(new Blob([this.log.text()], { type: "text/plain;charset=utf-8" }));
            const day = new Date().toISOString().slice(0, 19).replace(/[:T]/g, "-");
            make("a", { href: address, download: "lora-guard-" + day + ".txt" }).click();
            setTimeout(() => URL.revokeObjectURL(address), 10000);
        }
    }

    /** Returns true on success. Browsers offer the clipboard API only to secure pages; http in a local network is not. */
    async function toClipboard(text) {
        try {
            await navigator.clipboard.writeText(text);
            return true;
        } catch (error) {
            const field = make("textarea", { "aria-hidden": "true" });
            Object.assign(field.style, { position: "fixed", opacity: "0" });
            field.value = text;
            document.body.append(field);
            field.select();
            const ok = document.execCommand("copy");
            field.remove();
            return ok;
        }
    }

    let panel = null;

    /** Attaches a panel to its element, again if the page has replaced the element. */
    function attach() {
        const place = document.getElementById(PLACE);
        if (panel && panel.place === place) return;
        if (panel) panel.close();
        panel = place ? new Panel(place) : null;
    }

    if (typeof onAfterUiUpdate === "function") onAfterUiUpdate(attach);
    else if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", attach);
    else attach();
})();
