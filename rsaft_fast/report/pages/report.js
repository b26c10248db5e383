"use strict";
// The charts and the slider of a report. Bokeh's runtime stands before this in the page.
(() => {
  document.documentElement.classList.add("js");
  const charts = JSON.parse(document.getElementById("chart-data").textContent);
  const gallery = JSON.parse(document.getElementById("gallery-data").textContent);
  if (window.Bokeh) Bokeh.set_log_level("warn");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse)").matches;
  const figures = new Map(); // chart to its figure
  const linked = []; // ranges of the charts over updates
  let all = null; // [start, end] of these

  function span(some) {
    const values = some.flatMap((chart) => chart.lines.flatMap((line) => line.x));
    let low = Infinity, high = -Infinity;
    for (const x of values) { low = Math.min(low, x); high = Math.max(high, x); }
    if (low > high) [low, high] = [0, 1];
    const margin = 0.02 * (high - low) || 1;
    return [low - margin, high + margin];
  }

  // Each chart is a document of its own, drawn when it is seen, so a range cannot be one object of several.
  function rangeOf(chart) {
    all ??= span(Object.values(charts).filter((one) => one.shared));
    const [start, end] = chart.shared ? all : span([chart]);
    const range = new Bokeh.Range1d({start, end, reset_start: start, reset_end: end});
    if (!chart.shared) return range;
    if (linked.length) range.setv({start: linked[0].start, end: linked[0].end});
    linked.push(range);
    range.change.connect(() => {
      for (const other of linked) {
        if (other.start !== range.start || other.end !== range.end) other.setv({start: range.start, end: range.end});
      }
    });
    return range;
  }

  function paint(figure) {
    const ink = dark.matches ? "#d0d0d6" : "#3a3a3e", grid = dark.matches ? "#3a3a40" : "#dddde0";
    for (const axis of [...figure.below, ...figure.left]) {
      axis.setv({
        axis_label_text_color: ink, major_label_text_color: ink, axis_line_color: ink,
        major_tick_line_color: ink, minor_tick_line_color: null,
      });
    }
    for (const one of figure.center) if (one.grid_line_color !== undefined) one.grid_line_color = grid;
  }

  async function draw(place) {
    const name = place.dataset.chart, chart = charts[name];
    if (figures.has(name)) return;
    const zoom = new Bokeh.BoxZoomTool({dimensions: "width"});
    const only = {dimensions: "width"};
    const figure = Bokeh.Plotting.figure({
      name, height: 260, sizing_mode: "stretch_width", x_range: rangeOf(chart), window_axis: "x",
      tools: [
        zoom, new Bokeh.PanTool(only), new Bokeh.WheelZoomTool(only), new Bokeh.ZoomInTool(only),
        new Bokeh.ZoomOutTool(only), new Bokeh.ResetTool(),
      ],
      toolbar_location: "above", background_fill_color: null, border_fill_color: null, outline_line_color: null,
      min_border_right: 12,
    });
    figures.set(name, figure);
    // A finger that moves over a chart scrolls the page.
    figure.toolbar.setv({logo: null, active_drag: coarse ? null : zoom, active_scroll: null});
    figure.below[0].axis_label = chart.x;
    if (chart.y) figure.left[0].axis_label = chart.y;
    const hovered = [];
    for (const line of chart.lines) {
      const y = line.y.map((value) => value ?? NaN);
      const source = new Bokeh.ColumnDataSource({data: {x: line.x, y}});
      if (line.half.length) {
        const low = y.map((value, i) => value - (line.half[i] ?? NaN)), high = y.map((value, i) => value + (line.half[i] ?? NaN));
        figure.varea({x: line.x, y1: low, y2: high, fill_color: line.colour, fill_alpha: 0.18});
      }
      const look = {source, line_color: line.colour, line_dash: line.dash};
      const drawn = figure.line({field: "x"}, {field: "y"}, {
        ...look, line_width: line.faint ? 1 : 2, line_alpha: line.faint ? 0.35 : 1, name: line.label,
      });
      if (line.points) {
        figure.scatter({field: "x"}, {field: "y"}, {source, size: 7, color: line.colour, name: line.label});
      }
      if (!line.faint) hovered.push(drawn);
    }
    for (const [step] of chart.marks) {
      figure.add_layout(new Bokeh.Span({
        location: step, dimension: "height", line_color: chart.markColour, line_dash: "dotted", line_width: 1.5,
      }));
    }
    const format = chart.shared ? "@x{0,0}" : "@x{0.0000}";
    const tooltips = [["", "$name"], [chart.x, format], [chart.y || "value", "@y{0.0000}"]];
    figure.add_tools(new Bokeh.HoverTool({renderers: hovered, tooltips, mode: chart.shared ? "vline" : "mouse"}));
    paint(figure);
    await Bokeh.Plotting.show(figure, place);
    place.dataset.drawn = "yes";
  }

  function keys(event) {
    const figure = figures.get(event.currentTarget.dataset.chart);
    if (!figure || event.ctrlKey || event.metaKey || event.altKey) return;
    const range = figure.x_range, width = range.end - range.start, middle = (range.start + range.end) / 2;
    const to = (start, end) => range.setv({start, end});
    if (event.key === "+" || event.key === "=") to(middle - width / 4, middle + width / 4);
    else if (event.key === "-") to(middle - width, middle + width);
    else if (event.key === "ArrowLeft") to(range.start - width / 5, range.end - width / 5);
    else if (event.key === "ArrowRight") to(range.start + width / 5, range.end + width / 5);
    else if (event.key === "0") to(range.reset_start, range.reset_end);
    else return;
    event.preventDefault();
  }

  // What nobody has scrolled to, or opened, is not drawn: the page is there at once.
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); }
    }
  }, {rootMargin: "200px"});
  for (const place of document.querySelectorAll(".plot")) {
    place.addEventListener("keydown", keys);
    seen.observe(place);
  }
  dark.addEventListener("change", () => figures.forEach(paint));
  window.rsaft = {figures}; // for whoever looks at the page from a console, or tests it

  const slider = document.getElementById("step");
  if (slider) {
    const pictures = [...document.querySelectorAll("img[data-column]")];
    for (const picture of pictures) picture.dataset.shown = picture.src;
    // A column without pictures of a step shows its newest ones before it, or what all began as.
    const source = (column, row, index) => {
      for (let i = index; i >= 0; i--) {
        if (i === gallery.shown[column]) return pictures.find((one) => one.dataset.column === column && one.dataset.row === row).dataset.shown;
        const there = gallery.columns[column]?.[gallery.steps[i]];
        if (there) return there[row];
      }
      return column === gallery.before ? "" : source(gallery.before, row, index);
    };
    const move = () => {
      const index = +slider.value, step = gallery.steps[index];
      document.getElementById("step-shown").textContent = step;
      slider.setAttribute("aria-valuetext", `${step} updates`);
      for (const picture of pictures) picture.src = source(picture.dataset.column, picture.dataset.row, index);
    };
    slider.addEventListener("input", move);
  }
})();
