// What all parts of the tab "LoRA Guard" share: elements, numbers as text, tooltips. The files of the tab meet in
// `window.loraGuard`; the order in which the WebUI loads them does not matter.
// Everything is inserted as text, never as HTML: names come from files of unknown authors.
(function () {
    "use strict";

    const guard = (window.loraGuard = window.loraGuard || {});
    const SVG = "http://www.w3.org/2000/svg";
    const EDGE_PX = 8;

    function dress(element, attributes, children) {
        for (const [name, value] of Object.entries(attributes || {})) {
            if (value !== null && value !== undefined) element.setAttribute(name, value);
        }
        element.append(...children.filter((child) => child !== null));
        return element;
    }

    /** Makes an element with attributes and children; strings become text nodes. */
    guard.make = (tag, attributes, ...children) => dress(document.createElement(tag), attributes, children);

    /** Makes an element of a drawing. */
    guard.draw = (tag, attributes, ...children) => dress(document.createElementNS(SVG, tag), attributes, children);

    guard.fill = (template, values) =>
        template.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? values[name] : whole));

    guard.size = (mb) => {
        if (mb === null || mb === undefined) return "?";
        return mb >= 1024 ? (mb / 1024).toFixed(mb >= 10240 ? 1 : 2) + " GB" : mb.toFixed(mb >= 100 ? 0 : 1) + " MB";
    };

    guard.duration = (ms) => {
        if (ms === null) return "?";
        return ms >= 1000 ? (ms / 1000).toFixed(2) + " s" : ms.toFixed(ms >= 10 ? 0 : 1) + " ms";
    };

    guard.clock = (seconds) => {
        const time = new Date(seconds * 1000);
        return [time.getHours(), time.getMinutes(), time.getSeconds()].map((n) => String(n).padStart(2, "0")).join(":");
    };

    /** Makes a word with an explanation, which the pointer or the Tab key shows. */
    guard.term = (text, tip, attributes) =>
        guard.make("span", { class: "lg-term", tabindex: "0", "data-tip": tip, ...attributes }, text);

    /** Shows the explanations of everything with `data-tip` inside `place`. One box for all of them. */
    guard.Tips = class {
        constructor(place) {
            this.place = place;
            this.box = guard.make("div", { class: "lg-tip", role: "tooltip", id: "lora_guard_tip" });
            this.box.hidden = true;
            const over = (event) => {
                const target = event.target.closest("[data-tip]");
                // A chart shows its own, whichever line in it the pointer is on.
                if (target || !this.target || !this.target.contains(event.target)) this.show(target);
            };
            place.addEventListener("pointerover", over);
            place.addEventListener("focusin", over);
            place.addEventListener("pointerleave", () => this.hide());
            place.addEventListener("focusout", () => this.hide());
            place.addEventListener("keydown", (event) => {
                if (event.key === "Escape") this.hide();
            });
        }

        show(target) {
            if (!target) return this.hide();
            if (target === this.target) return;
            this.hide();
            this.described(target).setAttribute("aria-describedby", this.box.id);
            this.say(target, target.dataset.tip, target.getBoundingClientRect());
        }

        /** Returns the element that a screen reader is on: a label explains its field. */
        described(target) {
            return target.control || target;
        }

        /** Redraws a place. The focus stays on the same file or the same position, and its explanation stays open. */
        redraw(place, children) {
            const stops = () => [...place.querySelectorAll("[tabindex], button")];
            const at = stops().indexOf(document.activeElement), isOpen = place.contains(this.target);
            const { file } = document.activeElement.dataset;
            place.replaceChildren(...children);
            if (at < 0) return;
            const same = file === undefined ? stops()[at] : stops().find((one) => one.dataset.file === file);
            if (same) same.focus({ preventScroll: true });
            if (!isOpen) this.hide();
        }

        /** Shows a text of an element beside a rectangle of the window. */
        say(target, text, near) {
            if (target !== this.target) this.hide();
            this.target = target;
            this.box.textContent = text;
            this.place.append(this.box);
            this.box.hidden = false;
            const place = this.place.getBoundingClientRect(), box = this.box.getBoundingClientRect();
            const left = Math.max(EDGE_PX, Math.min(near.left, document.documentElement.clientWidth - box.width - EDGE_PX));
            const above = near.top - box.height - EDGE_PX;
            this.box.style.left = left - place.left + "px";
            this.box.style.top = (above > EDGE_PX ? above : near.bottom + EDGE_PX) - place.top + "px";
        }

        hide() {
            if (this.target) this.described(this.target).removeAttribute("aria-describedby");
            this.target = null;
            this.box.hidden = true;
        }
    };

    /** Copies a text; returns true on success. Browsers offer the clipboard only to secure pages; http in a local network
     * is not. */
    guard.toClipboard = async (text) => {
        try {
            await navigator.clipboard.writeText(text);
            return true;
        } catch (error) {
            const field = guard.make("textarea", { "aria-hidden": "true" });
            Object.assign(field.style, { position: "fixed", opacity: "0" });
            field.value = text;
            document.body.append(field);
            field.select();
            const ok = document.execCommand("copy");
            field.remove();
            return ok;
        }
    };

    /** Offers a text as a file. */
    guard.offer = (text, name) => {
        const address = URL.createObjectURL(new Blob([text], { type: "text/plain;charset=utf-8" }));
        guard.make("a", { href: address, download: name }).click();
        setTimeout(() => URL.revokeObjectURL(address), 10000);
    };
})();
