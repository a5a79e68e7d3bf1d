/* <router-group>: the card of one group on a <router-desk>, with two faders an expert.
 *
 * A drag or a key asks the desk to move something; the desk routes and draws its cards.
 */
(() => {
  if (customElements.get("router-group")) return;
  const KEYS = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1,
    PageUp: 10, PageDown: -10, Home: -200, End: 200 };
  const SPAN = { s: 2, b: 1 }; // what a chart's height stands for
  const level = (v) => `${(50 * (v + 0.5)).toFixed(2)}%`; // from −0.5 to 1.5

  class RouterGroup extends HTMLElement {
    connectedCallback() {
      const desk = this.closest("router-desk");
      if (!desk || this.desk) return;
      this.desk = desk;
      this.number = [...this.parentElement.children].indexOf(this);
      this.experts = desk.members(this.number);
      this.setAttribute("role", "group");
      this.ariaLabel = `group ${this.number}`;
      this.innerHTML = this.markup();
      this.querySelectorAll("[role=slider]").forEach((grip) => this.listen(grip));
    }

    markup() {
      const row = (name, label, inside) => `<div class="strip ${name}"><span>${
        label}</span>${this.experts.map(inside).join("")}</div>`;
      const column = (v, name, parts) => (i) => `<div class="column" data-x="${i}">${
        parts}<b class="${v}" role="slider" tabindex="0" aria-orientation="vertical"
        aria-label="expert ${i}, ${name} ${v}" aria-valuemin="${this.desk.limits[v][0]}"
        aria-valuemax="${this.desk.limits[v][1]}"></b></div>`;
      return `<p class="title"><b>group ${this.number}</b> <em></em><span></span></p>${
        row("choices", "<u>1</u><u>0</u><i class='bar'></i>", column("s", "affinity",
          "<i class='s'></i><i class='b'></i><i class='line'></i>"))}${
        row("names", "", (i) => `<b class="column" data-x="${i}">${i}</b>`)}${
        row("biases", "<u>0</u>", column("b", "bias", "<i class='b'></i>"))}${
        ["s", "b", "s+b", "g"].map((label) => row("cells", label, (i) =>
          `<output data-x="${i}" data-row="${label}"></output>`)).join("")}`;
    }

    /* Pointer and keys of one grip; Enter leads to the field where one types. */
    listen(grip) {
      const { desk } = this;
      const [v, column] = [grip.className, grip.parentElement];
      const i = +column.dataset.x;
      let drag = null;
      grip.addEventListener("focus", () => desk.select(i));
      grip.addEventListener("pointerdown", (event) => {
        event.preventDefault();
        grip.focus({ preventScroll: true });
        grip.setPointerCapture(event.pointerId);
        drag = { y: event.clientY, from: desk[v][i] };
        desk.classList.add("drag");
      });
      grip.addEventListener("pointermove", (event) => {
        if (!drag) return;
        const up = (drag.y - event.clientY) / column.clientHeight;
        desk.move(v, i, drag.from + SPAN[v] * up);
      });
      grip.addEventListener("lostpointercapture", () => {
        drag = null;
        desk.classList.remove("drag");
      });
      grip.addEventListener("keydown", (event) => {
        if (event.key === "Enter") desk.querySelector(`input[name=${v}]`).select();
        else if (event.key in KEYS) desk.move(v, i, desk[v][i] + KEYS[event.key] / 100);
        else return;
        event.preventDefault();
      });
    }

    /* Shows the desk's numbers. A closed expert has no place in the order: its choice
       is struck out, or stands at 0 where a wrong mask put it. */
    draw(desk) {
      const { s, b, affinity, choice, masked, chosen, gates, show } = desk;
      const open = desk.kept.includes(this.number);
      const [one, two, score] = desk.scored(this.number).map(show);
      this.classList.toggle("closed", !open);
      this.querySelector("em").textContent = open ? "open" : "closed";
      this.querySelector(".title span").textContent =
        two ? `${one} + ${two} = ${score}`.replace("+ −", "− ") : `best: ${one}`;
      const shown = (i) => (masked[i] === 0 ? 0 : choice[i]);
      this.querySelectorAll(".column").forEach((column) => {
        const i = +column.dataset.x;
        const [low, high] = [affinity[i], choice[i]].sort((x, y) => x - y);
        column.classList.toggle("chosen", chosen.includes(i));
        column.classList.toggle("lost", !open && choice[i] > masked[chosen.at(-1)]);
        column.classList.toggle("at", desk.at === i);
        const at = { s: s[i], a: affinity[i], line: shown(i), low, high };
        for (const name in at) column.style.setProperty(`--${name}`, level(at[name]));
        column.style.setProperty("--b", b[i]);
        const grip = column.querySelector("[role=slider]");
        if (!grip) return;
        grip.setAttribute("aria-valuenow", desk[grip.className][i].toFixed(2));
        grip.setAttribute("aria-valuetext", show(desk[grip.className][i]));
      });
      this.querySelectorAll("output").forEach((cell) => {
        const i = +cell.dataset.x;
        const [row, isChosen] = [cell.dataset.row, chosen.includes(i)];
        cell.className = isChosen ? "chosen" : "";
        if (row === "s+b" && !open)
          cell.classList.add(masked[i] === 0 ? "zeroed" : "out");
        cell.value = row === "g" ? (isChosen ? show(gates[i]) : "·")
          : show({ s: affinity, b, "s+b": choice.map((_, x) => shown(x)) }[row][i]);
      });
    }
  }
  customElements.define("router-group", RouterGroup);
})();
