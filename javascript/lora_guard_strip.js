// The strip on top of the tab "LoRA Guard": one sentence, and problems that stay until they are closed.
(function () {
    "use strict";

    const guard = (window.loraGuard = window.loraGuard || {});
    const CLOSED = "lora_guard_closed";
    const KEPT = 30;  // problems that are past, and closed ones
    const LEVELS = ["good", "warning", "bad"];

    /** Problems that were closed in this browser, by id. */
    function closed() {
        try {
            const kept = JSON.parse(localStorage.getItem(CLOSED) || "[]");
            return Array.isArray(kept) ? kept.map(String) : [];
        } catch (error) {
            return [];  // no storage in this browser, or not ours
        }
    }

    guard.Strip = class {
        constructor(label) {
            const { make } = guard;
            this.label = label;
            this.known = new Map();
            this.closed = new Set(closed());
            this.line = make("p", { class: "lg-headline", role: "status" });
            this.list = make("ul", { class: "lg-problems", role: "list" });
            this.element = make("section", { class: "lg-strip", "data-level": "good", "aria-label": "LoRA Guard" }, this.line, this.list);
        }

        show(status) {
            for (const problem of status.problems) this.known.set(problem.id, problem);
            const now = new Set(status.problems.map((problem) => problem.id));
            for (const id of this.known.keys()) {
                if (this.known.size > KEPT && !now.has(id)) this.known.delete(id);
            }
            this.tell(status.headline.level, status.headline.text);
        }

        /** Says that the server does not answer. */
        gone(text) {
            this.tell("bad", text);
        }

        tell(level, text) {
            const open = [...this.known.values()].filter((problem) => !this.closed.has(problem.id));
            const drawn = JSON.stringify([level, text, open]);
            if (drawn === this.drawn) return;
            this.drawn = drawn;
            this.level = level;
            const worst = Math.max(...[level, ...open.map((problem) => problem.level)].map((one) => LEVELS.indexOf(one)));
            this.element.dataset.level = LEVELS[worst];
            if (this.line.textContent !== text) this.line.textContent = text;
            this.list.replaceChildren(...open.map((problem) => this.problem(problem)));
            this.list.hidden = !open.length;
        }

        problem(problem) {
            const { make } = guard;
            const button = make("button", { type: "button", class: "lg-close", "aria-label": this.label("close"), "data-tip": this.label("close") }, "×");
            button.addEventListener("click", () => this.close(problem.id));
            return make("li", { class: "lg-problem", "data-level": problem.level }, make("span", {}, problem.text), button);
        }

        close(id) {
            this.closed.add(id);
            try {
                localStorage.setItem(CLOSED, JSON.stringify([...this.closed].slice(-KEPT)));
            } catch (error) {
                // Closed until the page is loaded again.
            }
            this.tell(this.level, this.line.textContent);
        }
    };
})();
