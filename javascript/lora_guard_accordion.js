// The badge on the accordion "LoRA Guard" in txt2img and img2img. It is read off what the page has anyway, the infotext and
// the lines under an image, when these change. The server is asked once each time the accordion is opened, and while it is
// open once after each image. Everything is inserted as text: names come from files of unknown authors.
(function () {
    "use strict";

    const TABS = ["txt2img", "img2img"];
    const SUMMARY = /LoRA Guard: ("(?:[^"\\]|\\.)*"|[^,]*)/g;
    const OURS = "LoRA Guard: ";
    const ASK_AFTER_MS = 200;

    function find(id) {
        return gradioApp().getElementById(id);
    }

    function text(id) {
        const element = find(id);
        return element ? element.textContent : "";
    }

    /** The state of the image that is shown, or null: it has no LoRAs, or there is none. */
    function stateOf(tab) {
        const summaries = [...text("html_info_" + tab).matchAll(SUMMARY)];
        if (!summaries.length) return null;
        if (/(^|, )without /.test(summaries[summaries.length - 1][1].replace(/^"|"$/g, ""))) return "left_out";
        return text("html_log_" + tab).includes(OURS) ? "otherwise" : "active";
    }

    function show(tab, accordion, badge) {
        const told = accordion.querySelector(".lora_guard_state");
        if (!told) return;
        const state = told.hasAttribute("data-off") ? "off" : stateOf(tab);
        const chosen = accordion.querySelector("#lora_guard_" + tab + "_mode input:checked");
        const mode = chosen && chosen.value ? chosen.closest("label").textContent.trim() : "";
        const words = state === null ? "" : JSON.parse(told.getAttribute("data-words"))[state];
        const said = [mode, words].filter(Boolean).join(": ");
        // Only what differs is written: the observer sees this too.
        if (badge.textContent !== said) badge.textContent = said;
        if (badge.dataset.state !== (state || "")) badge.dataset.state = state || "";
    }

    function start(tab) {
        const accordion = find("lora_guard_" + tab);
        const name = accordion && accordion.querySelector(".label-wrap");
        if (!name || name.querySelector(".lora_guard_badge")) return;
        const badge = document.createElement("span");
        badge.className = "lora_guard_badge";
        badge.setAttribute("role", "status");
        name.firstElementChild.append(badge);
        const look = () => show(tab, accordion, badge);
        let asking = 0;
        const ask = () => {
            clearTimeout(asking);
            asking = setTimeout(() => {
                if (name.classList.contains("open")) find("lora_guard_" + tab + "_opened")?.click();
            }, ASK_AFTER_MS);
        };
        name.addEventListener("click", ask);
        const image = new MutationObserver(() => {
            look();
            ask();
        });
        for (const element of [find("html_info_" + tab), find("html_log_" + tab)]) {
            if (element) image.observe(element, { childList: true, characterData: true, subtree: true });
        }
        // A mode that was chosen or pasted, another text from the server.
        const fields = { attributes: true, attributeFilter: ["class", "data-off"], childList: true, subtree: true };
        new MutationObserver(look).observe(accordion, fields);
        look();
    }

    // The tab alone, outside a WebUI, has no txt2img.
    if (typeof onUiLoaded === "function") onUiLoaded(() => TABS.forEach(start));
})();
