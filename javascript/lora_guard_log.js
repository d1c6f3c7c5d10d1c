// The log of the tab "LoRA Guard", with its tools.
(function () {
    "use strict";

    const guard = (window.loraGuard = window.loraGuard || {});
    const ROWS = 2000;
    const BOTTOM_PX = 8;
    const LEVELS = ["debug", "info", "warning", "error"];

    /** Rows by number, a divider for each image, filters, and a view that follows its end until the reader scrolls up. */
    guard.Log = class {
        constructor(label) {
            const { make } = guard;
            this.label = label;
            this.rows = new Map();
            this.era = 0;
            this.image = 0;
            this.following = true;
            this.wanted = "";
            this.list = make("div", { class: "lg-lines", role: "log", tabindex: "0", "aria-label": label("log"), dir: "ltr" });
            this.newest = make("button", { type: "button", class: "lg-button lg-newest", "data-tip": label("tip_newest") }, "↓ " + label("newest"));
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
                if (old) {
                    old.replaceWith(row);
                } else {
                    if (line.image > this.image) {
                        this.image = line.image;
                        const text = guard.fill(this.label("image"), { number: line.image });
                        fresh.append(this.divider(text, "debug", "image-" + line.image));
                    }
                    fresh.append(row);
                }
                this.rows.set(number, row);
            }
            this.list.append(fresh);
            this.trim();
            if (this.following) this.toEnd();
        }

        /** Adds a divider. The server's numbers start anew after it; earlier rows stay. */
        divide(text) {
            this.era += 1;
            this.image = 0;
            this.list.append(this.divider(text, "error", ""));
        }

        divider(text, level, name) {
            const row = guard.make("div", { class: "lg-line lg-divider", "data-level": level }, "—— " + text + " ——");
            this.rows.set(this.era + ":" + name, row);
            return row;
        }

        row(line) {
            const { make, clock } = guard;
            const level = LEVELS.includes(line.level) ? line.level : "error";
            const word = level === "info" ? "" : this.label(level) + this.label("colon");
            const row = make("div", { class: "lg-line lg-" + level, "data-level": level },
                make("span", { class: "lg-time" }, clock(line.time)), " ",
                make("span", { class: "lg-level" }, word),
                make("span", { class: "lg-text" }, line.text),
                line.why ? this.why(line.why) : null);
            row.hidden = !this.isWanted(row);
            return row;
        }

        /** Makes the button that unfolds the explanation of a line. */
        why(text) {
            const { make } = guard;
            const told = make("div", { class: "lg-why" }, text);
            told.hidden = true;
            const button = make("button", { type: "button", class: "lg-link", "aria-expanded": "false", "data-tip": this.label("tip_why") }, this.label("why"));
            button.addEventListener("click", () => {
                told.hidden = !told.hidden;
                button.setAttribute("aria-expanded", String(!told.hidden));
            });
            return make("span", { class: "lg-why-place" }, " ", button, told);
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

        /** Returns the visible lines as text, without the buttons in them. */
        text() {
            const shown = [...this.list.children].filter((row) => !row.hidden && getComputedStyle(row).display !== "none");
            const parts = (row) => row.querySelectorAll(".lg-time, .lg-level, .lg-text");
            const line = (row) => [...parts(row)].map((part, place) => (place === 1 ? " " : "") + part.textContent).join("");
            return shown.map((row) => line(row) || row.textContent).join("\n") + "\n";
        }

        filter(level) {
            this.list.dataset.least = level;
            if (this.following) this.toEnd();
        }

        /** Hides the lines without a word. */
        search(word) {
            this.wanted = word.toLowerCase();
            for (const row of this.list.children) row.hidden = !this.isWanted(row);
            if (this.following) this.toEnd();
        }

        isWanted(row) {
            return !this.wanted || row.textContent.toLowerCase().includes(this.wanted);
        }
    };

    /** The log in its section, with a toolbar. `panel` has `pause()`. */
    guard.LogSection = class {
        constructor(label, panel, least) {
            const { make } = guard;
            this.label = label;
            this.log = new guard.Log(label);
            this.log.filter(least);
            this.levels = make("select", { class: "lg-select", "aria-label": label("level") },
                ...LEVELS.map((level) => make("option", { value: level }, label("level_" + level))));
            this.levels.value = least;
            this.levels.addEventListener("change", () => this.log.filter(this.levels.value));
            this.word = make("input", { type: "search", class: "lg-select lg-search", "data-tip": label("tip_search"), placeholder: label("search"), "aria-label": label("search") });
            this.word.addEventListener("input", () => this.log.search(this.word.value));
            this.pause = this.button("pause", () => panel.pause());
            this.copy = this.button("copy", () => this.copyText());
            this.state = make("span", { class: "lg-state", role: "status", "data-state": "live" });
            const tools = make("div", { class: "lg-tools", role: "toolbar", "aria-label": label("log") },
                make("label", { class: "lg-label", "data-tip": label("tip_level") }, label("level") + " ", this.levels), this.word,
                this.pause, this.copy, this.button("download", () => this.download()), this.state);
            this.element = make("section", { class: "lg-log", "aria-label": label("log") }, make("h3", {}, label("log")), tools, this.log.box);
        }

        button(name, action) {
            const made = guard.make("button", { type: "button", class: "lg-button lg-" + name, "data-tip": this.label("tip_" + name) }, this.label(name));
            made.addEventListener("click", action);
            return made;
        }

        async copyText() {
            const ok = await guard.toClipboard(this.log.text());
            this.copy.textContent = this.label(ok ? "copied" : "copy_failed");
            setTimeout(() => { this.copy.textContent = this.label("copy"); }, ok ? 1500 : 4000);
        }

        download() {
            const day = new Date().toISOString().slice(0, 19).replace(/[:T]/g, "-");
            guard.offer(this.log.text(), "lora-guard-" + day + ".txt");
        }
    };
})();
