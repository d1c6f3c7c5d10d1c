// The curve of the tab "LoRA Guard": VRAM and RAM over the last images, drawn as plain SVG.
(function () {
    "use strict";

    const guard = (window.loraGuard = window.loraGuard || {});
    const SAMPLES = 600;
    const IMAGES = 6;
    const KINDS = ["load", "encode", "steps", "decode", "other"];
    const LONGEST_PAUSE = 5;  // seconds drawn of a time without a phase, however long it was
    const HEIGHT = 96, TOP = 16, LEFT = 2, RIGHT = 2;

    /** Samples come as rows of these columns (reporting/curve.py). */
    const NUMBER = 0, TIME = 1, IMAGE = 2, KIND = 3, VRAM = 4, RAM = 5, PROMISED = 6;

    guard.Curve = class {
        constructor(label, tips) {
            const { make } = guard;
            this.label = label;
            this.tips = tips;
            this.charts = {};
            this.forget();
            this.place = make("div", { class: "lg-charts" });
            this.peak = make("p", { class: "lg-peak" });
            this.element = make("section", { class: "lg-curve", "aria-label": label("curve") },
                make("h3", {}, label("curve")), this.place, this.peak, this.legend());
            new ResizeObserver(() => this.draw()).observe(this.place);
        }

        /** Forgets every sample: the server's numbers start anew. */
        forget() {
            this.samples = [];
            this.images = [];
            this.last = 0;
            this.total = { vram: null, ram: null };
            this.chosen = null;  // the number of the sample under the cursor
            if (this.place) this.draw();
        }

        /** Adds what the server has new. */
        add(curve) {
            const fresh = curve.samples.filter((sample) => sample[NUMBER] > this.last);
            if (!fresh.length && JSON.stringify(curve.images) === JSON.stringify(this.images) && this.place.childNodes.length) return;
            this.samples.push(...fresh);
            this.images = curve.images;
            if (fresh.length) this.last = fresh[fresh.length - 1][NUMBER];
            this.total = { vram: curve.vram_total_mb || this.total.vram, ram: curve.ram_total_mb || this.total.ram };
            const oldest = Math.max(0, ...this.samples.slice(-1).map((sample) => sample[IMAGE])) - IMAGES;
            this.samples = this.samples.filter((sample) => sample[IMAGE] > oldest).slice(-SAMPLES);
            this.draw();
        }

        legend() {
            const { make, term } = guard;
            const key = (name, sample) => make("li", {}, make("span", { class: "lg-key " + sample, "aria-hidden": "true" }),
                term(this.label(name), this.label("tip_" + name.replace("phase_", ""))));
            this.promised = key("promised", "lg-key-dashed");
            return make("ul", { class: "lg-legend lg-curve-legend", role: "list" },
                key("measured", "lg-key-line"), this.promised,
                ...KINDS.filter((kind) => kind !== "other").map((kind) => key("phase_" + kind, "lg-key-" + kind)));
        }

        draw() {
            const { make } = guard;
            if (!this.samples.length) {
                this.charts = {};
                this.place.replaceChildren(make("p", { class: "lg-quiet" }, this.label("curve_empty")));
                this.peak.textContent = "";
                return;
            }
            const width = Math.max(200, this.place.clientWidth || 600);
            this.xs = this.places(width);
            const charts = [], hasVram = this.samples.some((sample) => sample[VRAM] !== null);
            // Without a card there is one line, RAM's, and nothing was promised.
            this.element.classList.toggle("lg-without-vram", !hasVram);
            this.promised.hidden = !hasVram;
            if (hasVram) charts.push(this.chart("vram", VRAM));
            if (this.samples.some((sample) => sample[RAM] !== null)) charts.push(this.chart("ram", RAM));
            const shown = [...this.place.children];
            if (shown.length !== charts.length || shown.some((one, place) => one !== charts[place].element)) {
                this.place.replaceChildren(...charts.map((chart) => chart.element));
            }
            for (const chart of charts) this.fill(chart, width);
            this.peak.textContent = this.peakText();
        }

        /** Returns where each sample is, in pixels: time runs evenly, but pauses are cut short. */
        places(width) {
            let now = 0;
            const seconds = this.samples.map((sample, place) => {
                if (place) {
                    const before = this.samples[place - 1];
                    const passed = Math.max(0, sample[TIME] - before[TIME]);
                    now += before[KIND] === "" ? Math.min(passed, LONGEST_PAUSE) : passed;
                }
                return now;
            });
            // Samples of one moment lie side by side.
            const along = now ? seconds.map((second) => second / now) : seconds.map((_, place) => place / Math.max(1, seconds.length - 1));
            return along.map((share) => LEFT + share * (width - LEFT - RIGHT));
        }

        /** Returns the place of the sample nearest to a pixel. Where one phase ends the next begins: both samples may have
         * the same place. From the left the pointer finds the oldest of them, from the right the newest. */
        nearest(x) {
            return this.xs.reduce((best, one, place) => {
                const nearer = Math.abs(this.xs[best] - x) - Math.abs(one - x);
                return nearer > 0 || (nearer === 0 && x >= one) ? place : best;
            }, 0);
        }

        /** Returns a chart, which stays the same element: the focus and the pointer are on it while samples arrive. */
        chart(name, column) {
            if (this.charts[name]) return this.charts[name];
            const { make, draw } = guard;
            const drawing = draw("svg", {
                class: "lg-chart", height: HEIGHT, tabindex: "0", role: "slider", "data-name": name,
                "aria-label": this.label("curve") + ": " + this.label("tip_" + name), "aria-valuemin": "0",
            });
            const head = make("div", { class: "lg-chart-head" });
            const chart = { name, column, drawing, head, element: make("div", { class: "lg-chart-place" }, head, drawing) };
            this.listen(chart);
            return (this.charts[name] = chart);
        }

        /** Draws the samples into a chart. A sample whose tip is shown keeps it, at its new place. */
        fill(chart, width) {
            const { make, draw, size } = guard;
            const { name, column, drawing } = chart;
            const known = this.samples.map((sample) => sample[column]).filter((mb) => mb !== null);
            const total = (chart.total = this.total[name] || Math.max(...known));
            const y = (mb) => TOP + (HEIGHT - TOP) * (1 - Math.max(0, Math.min(1, mb / total)));
            chart.cursor = draw("line", { class: "lg-cursor", y1: TOP, y2: HEIGHT });
            for (const [attribute, value] of Object.entries({ viewBox: "0 0 " + width + " " + HEIGHT, width })) drawing.setAttribute(attribute, value);
            drawing.setAttribute("aria-valuemax", String(this.samples.length - 1));
            drawing.replaceChildren(...this.bands(), ...this.dividers(),
                draw("line", { class: "lg-limit", x1: 0, x2: width, y1: TOP, y2: TOP }),
                ...this.lines(column, y).map((points) => draw("polyline", { class: "lg-used lg-used-" + name, points })),
                ...(name === "vram" ? this.lines(PROMISED, y, true).map((points) => draw("polyline", { class: "lg-promised", points })) : []),
                chart.cursor);
            chart.head.replaceChildren(make("strong", {}, this.label("name_" + name)), " ",
                make("span", { class: "lg-quiet" }, guard.fill(this.label("limit_" + name), { used: size(known[known.length - 1]), total: size(total) })));
            this.point(chart);
            if (this.tips.target === drawing && drawing.isConnected) this.tell(chart);
            else chart.cursor.style.display = "none";
        }

        /** Returns the place of the chosen sample, or that of the newest. Of one that was let go, the oldest has the place. */
        get at() {
            const last = this.samples.length - 1;
            if (this.chosen === null) return last;
            const place = this.samples.findIndex((sample) => sample[NUMBER] >= this.chosen);
            return place < 0 ? last : place;
        }

        /** Moves a chart's value and cursor to the chosen sample. */
        point({ drawing, cursor, column, total }) {
            drawing.setAttribute("aria-valuenow", String(this.at));
            drawing.setAttribute("aria-valuetext", this.text(this.at, column, total));
            cursor.setAttribute("x1", this.xs[this.at]);
            cursor.setAttribute("x2", this.xs[this.at]);
        }

        /** Shows the chosen sample. */
        tell(chart) {
            this.point(chart);
            chart.cursor.style.display = "";
            const box = chart.drawing.getBoundingClientRect();
            const near = { left: box.left + this.xs[this.at] + 6, top: box.top + TOP, bottom: box.bottom };
            this.tips.say(chart.drawing, this.text(this.at, chart.column, chart.total), near);
        }

        /** A band for each phase, from its first sample to the next phase. */
        bands() {
            const bands = [];
            this.samples.slice(0, -1).forEach((sample, place) => {
                const last = bands[bands.length - 1], end = this.xs[place + 1];
                if (last && last.kind === sample[KIND] && last.image === sample[IMAGE]) last.end = end;
                else bands.push({ kind: sample[KIND], image: sample[IMAGE], begin: this.xs[place], end });
            });
            return bands.filter((band) => KINDS.includes(band.kind) && band.end > band.begin).map((band) => guard.draw("rect", {
                class: "lg-band lg-band-" + band.kind, x: band.begin.toFixed(1), y: TOP,
                width: (band.end - band.begin).toFixed(1), height: HEIGHT - TOP,
            }));
        }

        /** A line and the number where an image begins. */
        dividers() {
            const { draw } = guard;
            let labelled = -100;
            return this.samples.flatMap((sample, place) => {
                if (place && sample[IMAGE] === this.samples[place - 1][IMAGE]) return [];
                const x = this.xs[place], shown = [draw("line", { class: "lg-image-line", x1: x, x2: x, y1: 0, y2: HEIGHT })];
                if (x - labelled > 24) {
                    labelled = x;
                    // At the end of the curve it stands on the other side.
                    const isLast = this.xs[this.xs.length - 1] - x < 16;
                    const at = isLast ? { x: x - 3, "text-anchor": "end" } : { x: x + 3 };
                    shown.push(draw("text", { class: "lg-image-number", y: TOP - 5, ...at }, String(sample[IMAGE])));
                }
                return shown;
            });
        }

        /** Returns the points of a column, a list for each stretch without gaps. A step line keeps a value until the next. */
        lines(column, y, steps = false) {
            const stretches = [];
            let points = [];
            this.samples.forEach((sample, place) => {
                if (sample[column] === null) {
                    if (points.length) stretches.push(points);
                    points = [];
                    return;
                }
                const x = this.xs[place].toFixed(1);
                if (steps && points.length) points.push(x + "," + points[points.length - 1].split(",")[1]);
                points.push(x + "," + y(sample[column]).toFixed(1));
            });
            if (points.length) stretches.push(points);
            return stretches.map((one) => one.join(" "));
        }

        listen(chart) {
            const { drawing } = chart;
            const choose = (place) => {
                this.chosen = this.samples[place][NUMBER];
                this.tell(chart);
            };
            const hide = () => {
                chart.cursor.style.display = "none";
                this.tips.hide();
            };
            drawing.addEventListener("pointermove", (event) => {
                const x = event.clientX - drawing.getBoundingClientRect().left;
                choose(this.nearest(x));
            });
            drawing.addEventListener("pointerleave", hide);
            drawing.addEventListener("blur", hide);
            drawing.addEventListener("keydown", (event) => {
                if (event.key === "Escape") hide();
                const by = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
                if (by === undefined) return;
                event.preventDefault();
                choose(Math.max(0, Math.min(this.samples.length - 1, this.at + by)));
            });
        }

        /** Says what a point is. */
        text(place, column, total) {
            const { fill, size, clock } = guard;
            const sample = this.samples[place];
            const point = fill(this.label("point"), {
                time: clock(sample[TIME]), image: sample[IMAGE], phase: this.label("phase_" + sample[KIND]),
                name: this.label(column === VRAM ? "name_vram" : "name_ram"), used: size(sample[column]), total: size(total),
            });
            if (column !== VRAM || sample[PROMISED] === null) return point;
            return point + this.label("between") + fill(this.label("point_promised"), { promised: size(sample[PROMISED]) });
        }

        /** Says the peak of the last image that has one. */
        peakText() {
            const { fill, size } = guard;
            const image = [...this.images].reverse().find((one) => one.peak_mb !== null);
            if (!image) return "";
            const facts = { image: image.number, peak: size(image.peak_mb), promised: size(image.promised_mb), total: size(this.total.vram) };
            return fill(this.label(image.promised_mb === null ? "peak" : "peak_promised"), facts);
        }
    };
})();
