// The tab "LoRA Guard". It polls the server only while the tab is visible. The labels come from the server too
// (messages/catalogue/panel*.py).
(function () {
    "use strict";

    const guard = (window.loraGuard = window.loraGuard || {});
    const PLACE = "lora_guard_panel";
    const ADDRESS = "./lora-guard/panel";
    const EVERY_MS = 1000;
    const BACK_OFF_MS = [1000, 2000, 4000, 8000, 15000];
    const GIVE_UP_MS = 20000;

    /** The content of one element of the page, and the polling while it is visible. */
    class Panel {
        constructor(place) {
            this.place = place;
            place.replaceChildren();
            this.tips = new guard.Tips(place);
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
                if (this.log && this.log.log.following) this.log.log.toEnd();
                this.ask();
            }
        }

        async ask() {
            const request = (this.request = new AbortController());
            const limit = setTimeout(() => request.abort(), GIVE_UP_MS);
            let wait = EVERY_MS;
            try {
                const query = new URLSearchParams({
                    since: String(this.since), sample: String(this.curve ? this.curve.last : 0), boot: this.boot, language: this.language,
                });
                const told = await this.fetch(ADDRESS + "?" + query, { signal: request.signal });
                this.failures = 0;
                this.take(told);
                if (told.more) wait = 0;
            } catch (error) {
                if (this.isWatched) {
                    wait = BACK_OFF_MS[Math.min(this.failures, BACK_OFF_MS.length - 1)];
                    this.failures += 1;
                    this.state(error.status === 401 ? "log_in" : error.status === 403 ? "refused" : "waiting");
                }
            } finally {
                clearTimeout(limit);
                this.request = null;
                if (this.isWatched) this.timer = setTimeout(() => this.wake(), wait);
            }
        }

        async fetch(address, options) {
            const answer = await fetch(address, { cache: "no-store", credentials: "same-origin", ...options });
            if (!answer.ok) throw Object.assign(new Error("HTTP " + answer.status), { status: answer.status });
            return answer.json();
        }

        take(told) {
            if (told.labels && this.language !== told.language) this.draw(told.labels);
            else if (told.boot !== this.boot) this.restarted();
            if (!told.known) this.since = 0;
            this.boot = told.boot;
            this.language = told.language;
            if (told.lines.length) {
                this.since = told.lines[told.lines.length - 1].number;
                this.log.log.add(told.lines);
            }
            this.heard = Date.now() / 1000;
            this.strip.show(told.status);
            this.status.show(told.status);
            this.curve.add(told.curve);
            this.state("live");
        }

        restarted() {
            this.log.log.divide(this.label("restarted"));
            this.curve.forget();
        }

        label(name) {
            return (this.labels && this.labels[name]) || name;
        }

        /** Rebuilds everything in the language of `labels`; keeps the selected level. */
        draw(labels) {
            const least = this.log ? this.log.levels.value : "debug";
            this.labels = labels;
            this.tips.hide();
            const label = (name) => this.label(name);
            this.strip = new guard.Strip(label, this.place);
            this.curve = new guard.Curve(label, this.tips);
            this.status = new guard.Status(label, this.tips);
            this.tools = new guard.Tools(label);
            this.log = new guard.LogSection(label, this, least);
            this.place.replaceChildren(this.strip.element, this.curve.element, this.status.loras, this.status.memory, this.tools.element, this.status.inForce, this.log.element);
        }

        /** Shows whether the server answers: "live", "paused", "waiting", "log_in" or "refused". */
        state(name) {
            if (!this.log) {
                // There are no labels before the first answer.
                this.place.dataset.state = name;
                return;
            }
            delete this.place.dataset.state;
            this.place.classList.toggle("lg-gone", name !== "live" && name !== "paused");
            const line = this.log.state;
            if (line.dataset.state === name && line.textContent) return;
            line.dataset.state = name;
            line.textContent = this.label(name);
            if (name === "waiting") this.strip.gone(guard.fill(this.label("gone"), { time: guard.clock(this.heard) }));
            else if (name === "log_in" || name === "refused") this.strip.gone(this.label(name));
        }

        pause() {
            this.paused = !this.paused;
            this.log.pause.textContent = this.label(this.paused ? "resume" : "pause");
            this.wake();
            this.state(this.paused ? "paused" : "live");
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
