"use strict";
// The questions of a blinded comparison, their answers, and what follows from them.
(() => {
  document.documentElement.classList.add("js");
  const data = JSON.parse(document.getElementById("data").textContent);
  const names = JSON.parse(new TextDecoder().decode(Uint8Array.from(atob(data.names), (c) => c.charCodeAt(0))));
  const at = (id) => document.getElementById(id);
  const answers = new Map(); // place in data.pairs to {choice, seconds}
  let place = 0, shownAt = performance.now(), ended = false;

  // A page that was closed by mistake goes on where it was; where the browser keeps nothing, it works all the same.
  const keep = () => { try { localStorage.setItem(data.key, JSON.stringify([...answers])); } catch { /* not kept */ } };
  try {
    for (const [index, answer] of JSON.parse(localStorage.getItem(data.key) ?? "[]")) answers.set(index, answer);
    place = data.pairs.findIndex((_, index) => !answers.has(index));
    if (place < 0) place = data.pairs.length;
  } catch { /* a new start */ }

  function show() {
    at("done").textContent = answers.size;
    const pair = data.pairs[place];
    at("prompt").textContent = pair ? pair.prompt : "That was the last pair. Export the answers, please.";
    for (const side of ["left", "right"]) {
      const button = at(side);
      button.style.visibility = pair ? "visible" : "hidden";
      if (pair) button.querySelector("img").src = pair[side];
    }
    at("tie").disabled = !pair;
    at("back").disabled = place === 0;
    shownAt = performance.now();
  }

  function answer(choice) {
    if (ended || place >= data.pairs.length) return;
    answers.set(place, {choice, seconds: Math.round(performance.now() - shownAt) / 1000});
    place++;
    keep();
    show();
  }

  function back() {
    if (ended || place === 0) return;
    place--;
    answers.delete(place);
    keep();
    show();
  }

  function rows() {
    return [...answers].sort(([a], [b]) => a - b).map(([index, {choice, seconds}]) => {
      const pair = data.pairs[index];
      const [left, right] = pair.swapped ? [names[1], names[0]] : names;
      return {pair: pair.pair, prompt: pair.prompt, left, right, choice, preferred: {left, right}[choice] ?? "tie", seconds};
    });
  }

  function csv() {
    const cell = (value) => (/[",\r\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
    const lines = [data.columns, ...rows().map((row) => data.columns.map((name) => row[name]))];
    return lines.map((line) => line.map(cell).join(",")).join("\r\n") + "\r\n";
  }

  // Wilson's score interval, as rsaft_fast.report.preference has it.
  function wilson(wins, count) {
    if (!count) return [0, 1];
    const share = wins / count, weight = data.z ** 2 / count;
    const middle = (share + weight / 2) / (1 + weight);
    const half = (data.z / (1 + weight)) * Math.sqrt((share * (1 - share)) / count + weight / (4 * count));
    return [Math.max(0, middle - half), Math.min(1, middle + half)];
  }

  function reveal() {
    ended = true; // who knows the sides is no witness any more
    at("questions").hidden = true;
    const all = rows(), [first, second] = names;
    const wins = all.filter((row) => row.preferred === second).length;
    const losses = all.filter((row) => row.preferred === first).length;
    const [low, high] = wilson(wins, wins + losses);
    const percent = (value) => `${(100 * value).toFixed(1)} %`;
    const verdict = low > 0.5 ? `${second} is preferred` : high < 0.5 ? `${first} is preferred` : "it cannot be told which is preferred";
    const result = at("result");
    Object.assign(result.dataset, {wins, losses, ties: all.length - wins - losses, low, high});
    result.textContent = wins + losses
      ? `${verdict}: ${wins} of ${wins + losses} choices are for ${second} (${percent(wins / (wins + losses))}; 95 % interval `
        + `${percent(low)} to ${percent(high)}), the others for ${first}; ${all.length - wins - losses} ties. Counted as if pairs were independent.`
      : "No pair was chosen between.";
  }

  function download() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([csv()], {type: "text/csv"}));
    link.download = "answers.csv";
    link.click();
    URL.revokeObjectURL(link.href);
  }

  for (const side of ["left", "right"]) at(side).addEventListener("click", () => answer(side));
  at("tie").addEventListener("click", () => answer("tie"));
  at("back").addEventListener("click", back);
  at("export").addEventListener("click", download);
  at("reveal").addEventListener("click", reveal);
  const keys = {ArrowLeft: () => answer("left"), ArrowRight: () => answer("right"), ArrowDown: () => answer("tie"), Backspace: back};
  document.addEventListener("keydown", (event) => {
    if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    event.preventDefault();
    keys[event.key]();
  });
  show();
})();
