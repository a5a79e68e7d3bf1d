/* <router-verdict>: says in a sentence or two what happened on a <router-desk>.
 *
 * Under the right rule: who was locked out, who came in by a bias, what a negative
 * choice or a tie means. Under a wrong one: what it did, or why it does not show here.
 */
(() => {
  if (customElements.get("router-verdict")) return;
  const ORDER = ["best", "second best", "third best", "fourth best"];
  const without = (x, y) => x.filter((i) => !y.includes(i));
  const are = (x, one, more) => (x.length > 1 ? more : one);
  const the = (x, name = "expert") => // "experts 1, 3 and 5"
    `${name}${are(x, "", "s")} ${x.join(", ").replace(/, (\d+)$/, " and $1")}`;
  const capital = (text) => text[0].toUpperCase() + text.slice(1);

  /* For each rule (d the desk, right what the right rule would have made of it). */
  const SAY = {
    none(d) {
      const facts = [locked(d), brought(d), negative(d), tied(d)].filter(Boolean);
      return facts.slice(0, 2).join(" ") || `${capital(the(d.kept, "group"))} have the
        best pairs. Their four best experts share 2.5 in proportion to s; the other
        twelve do not run.`;
    },
    gates(d, right) {
      const [i, now, due] = furthest(d, right);
      if (now === "∞") return "The four s + b sum to 0, and nothing is divided by 0.";
      return now === due ? `Here the mistake does not show: s + b and s are in the same
        proportion for the four. Try “a bias brings one in”.` : `The right four, mixed
        wrongly: the biases leaked in. Expert ${i}’s gate is ${now} instead of ${due}.${
        d.chosen.some((x) => d.gates[x] < 0) ? ` And a negative gate subtracts what its
        expert says.` : ""}`;
    },
    zero(d, right) {
      const [came, left] = swapped(d, right);
      return came.length ? `Closed, and yet chosen: ${the(came)}. The mask’s 0 beats the
        ${d.show(d.choice[left[0]])} of expert ${left[0]}. A mask of −∞ beats nobody.`
        : `Here a mask of 0 does no harm: the four best of the open groups are not below
        it. Try “all biases negative”.`;
    },
    max(d, right) {
      const [open] = without(d.kept, right.kept);
      const [shut] = without(right.kept, d.kept);
      if (open === undefined) return `Here the best experts alone open the same groups.
        Try “one loud expert”.`;
      const [mine, its] = [open, shut].map((g) => d.show(right.groupScores[g]));
      return `Group ${open} is open for the sake of one expert’s
        ${d.show(d.groupScores[open])}. Its two best add up to ${mine} only, group ${
        shut}’s to ${its}.${swap(d, right)}`;
    },
    softmax(d, right) {
      const [i, now, due] = furthest(d, right);
      const same = now === due ? " Here the four and their gates stay as they were."
        : ` The four stay, but expert ${i}’s gate is ${now} instead of ${due}.`;
      return `The affinities now sum to 1, so one expert’s hangs on all the others’${
        d.b.some((v) => v) ? ", and a bias weighs more" : ""}.${
        swap(d, right) || same}`;
    },
  };

  const swapped = (d, right) =>
    [without(d.chosen, right.chosen), without(right.chosen, d.chosen)];

  function swap(d, right) {
    const [came, left] = swapped(d, right);
    return came.length ? ` ${capital(the(came))} ${are(came, "comes", "come")} in for ${
      the(left)}.` : "";
  }

  function furthest(d, right) { // the gate that is most wrong: whose, and both values
    const off = d.chosen.map((i) => Math.abs(d.gates[i] - right.gates[i]));
    const i = d.chosen[off.indexOf(Math.max(...off))] ?? d.chosen[0];
    return [i, d.show(d.gates[i]), d.show(right.gates[i])];
  }

  function locked(d) {
    const top = d.best(d.choice, d.chosen.length);
    const [i, ...more] = top.filter((x) => !d.kept.includes(d.home(x)));
    if (i === undefined) return "";
    const rival = d.best(d.groupScores, d.kept.length).at(-1);
    const [mine, its] = [d.home(i), rival].map((g) => d.show(d.groupScores[g]));
    return `Expert ${i} is the ${ORDER[top.indexOf(i)]} of all, but its group is closed:
      its two best add up to ${mine}, group ${rival}’s to ${its}${mine === its ?
      " too, and the lower number wins" : ""}.${more.length ? ` ${capital(the(more))} ${
      are(more, "is", "are")} locked out as well.` : ""}`;
  }

  function brought(d) {
    const plain = d.route(d.s, d.s.map(() => 0), "none").chosen;
    const came = without(d.chosen, plain);
    const biases = d.b.filter((v) => v);
    return came.length ? `The ${are(biases, "bias", "biases")} brought ${the(came)} in
      for ${the(without(plain, d.chosen))}; ${are(came, "its gate comes",
      "their gates come")} from s alone.` : biases.length > 1 && new Set(d.b).size === 1
      ? "All biases are equal: that changes no order, so it changes nothing." : "";
  }

  function negative(d) {
    const last = d.chosen.at(-1);
    return d.choice[last] < 0 ? `Expert ${last} is chosen with ${
      d.show(d.choice[last])}. Why not: only the order counts, and closed
      groups stand at −∞.` : "";
  }

  function tied(d) {
    const [last, next] = d.best(d.masked, d.chosen.length + 1).slice(-2);
    return d.masked[last] === d.masked[next] ? `Experts ${last} and ${next} tie for the
      last place: the lower number wins.` : "";
  }

  class RouterVerdict extends HTMLElement {
    judge(desk) {
      const right = desk.route(desk.s, desk.b, "none");
      const said = SAY[desk.rule](desk, right).replace(/\s+/g, " ");
      if (this.textContent !== said) this.textContent = said; // read aloud once
    }
  }
  customElements.define("router-verdict", RouterVerdict);
})();
