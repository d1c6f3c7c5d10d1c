// The buttons of the tab "LoRA Guard", and the question "will it fit?".
(function () {
    "use strict";

    const guard = (window.loraGuard = window.loraGuard || {});
    const ADDRESS = "./lora-guard/panel";
    const ACTIONS = ["free_vram", "free_ram", "forget"];
    const OWN_HEADER = { "X-LoRA-Guard": "1" };

    async function ask(address, options) {
        const answer = await fetch(ADDRESS + address, { cache: "no-store", credentials: "same-origin", ...options });
        if (!answer.ok) throw new Error("HTTP " + answer.status);
        return answer.json();
    }

    guard.Tools = class {
        constructor(label) {
            const { make } = guard;
            this.label = label;
            this.told = make("p", { class: "lg-told", role: "status" });
            this.told.hidden = true;
            const buttons = [...ACTIONS.map((name) => this.button(name, () => this.act(name))), this.button("report", () => this.report())];
            this.fit = make("details", { class: "lg-fit" }, make("summary", { "data-tip": label("tip_fit") }, label("fit")));
            this.fit.addEventListener("toggle", () => this.unfold());
            this.element = make("section", { class: "lg-doings", "aria-label": label("buttons") },
                make("div", { class: "lg-tools" }, ...buttons), this.told, this.fit);
        }

        button(name, action) {
            const made = guard.make("button", { type: "button", class: "lg-button", "data-tip": this.label("tip_" + name) }, this.label(name));
            made.addEventListener("click", async () => {
                made.disabled = true;
                this.tell("…");
                try {
                    await action();
                } catch (error) {
                    this.tell(guard.fill(this.label("not_done"), { error: error.message }));
                } finally {
                    made.disabled = false;
                }
            });
            return made;
        }

        tell(text) {
            this.told.textContent = text;
            this.told.hidden = false;
        }

        async act(name) {
            const answer = await ask("/do/" + name, { method: "POST", headers: OWN_HEADER });
            this.tell(answer.text || "");
        }

        async report() {
            const answer = await ask("/report");
            const ok = await guard.toClipboard(answer.text);
            if (!ok) guard.offer(answer.text, "lora-guard-report.txt");
            this.tell(this.label(ok ? "copied" : "copy_failed"));
        }

        /** Fetches the lists when the question is opened for the first time. */
        async unfold() {
            if (!this.fit.open || this.form) return;
            const { make } = guard;
            const choice = (name, several, names) => make("label", { class: "lg-choice", "data-tip": this.label("tip_" + name) }, this.label(name),
                make("select", { class: "lg-select", name, ...(several ? { multiple: "", size: "6" } : {}) },
                    ...names.map((one) => make("option", { value: one }, one))));
            this.form = make("form", { class: "lg-form" });
            try {
                const lists = await ask("/files");
                this.answer = make("div", { class: "lg-answer", role: "status" });
                this.form.append(choice("checkpoint", false, lists.checkpoints), choice("fit_loras", true, lists.loras),
                    make("button", { type: "submit", class: "lg-button", "data-tip": this.label("tip_ask") }, this.label("ask")), this.answer);
                this.fit.append(this.form);
            } catch (error) {
                this.form = null;
                this.tell(guard.fill(this.label("not_done"), { error: error.message }));
                return;
            }
            this.form.addEventListener("submit", (event) => {
                event.preventDefault();
                this.calculate();
            });
        }

        async calculate() {
            const { make, fill } = guard;
            const [checkpoint, loras] = this.form.querySelectorAll("select");
            const query = new URLSearchParams({ checkpoint: checkpoint.value });
            for (const option of loras.selectedOptions) query.append("lora", option.value);
            this.answer.dataset.level = "";
            this.answer.textContent = this.label("asking");
            try {
                const told = await ask("/fit?" + query);
                this.answer.dataset.level = told.fits === null ? "warning" : told.fits ? "good" : "bad";
                this.answer.replaceChildren(...told.lines.map((line) => make("p", {}, line)));
            } catch (error) {
                this.answer.textContent = fill(this.label("not_done"), { error: error.message });
            }
        }
    };
})();
