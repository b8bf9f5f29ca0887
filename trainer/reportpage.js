"use strict";
// Draws the figures of the page, in its colours, and lets a reader switch runs and light or dark.
(() => {
  const root = document.documentElement;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const touch = window.matchMedia("(pointer: coarse)").matches;
  const settings = {
    responsive: true,
    displaylogo: false,
    showSendToCloud: false, // plotly has a button that uploads the chart to its maker
    plotlyServerURL: "",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    toImageButtonOptions: { format: "png", scale: 2 },
  };

  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const plots = () => figures.map((figure) => document.getElementById(figure.id));

  function colours() {
    const axis = { gridcolor: colour("--grid"), linecolor: colour("--line"), zerolinecolor: colour("--line") };
    const flat = {};
    for (const side of ["xaxis", "yaxis"]) {
      for (const [key, value] of Object.entries(axis)) flat[`${side}.${key}`] = value;
    }
    return {
      ...flat,
      "font.color": colour("--text"),
      "hoverlabel.bgcolor": colour("--card"),
      "hoverlabel.bordercolor": colour("--line"),
      "hoverlabel.font.color": colour("--text"),
      "modebar.color": colour("--soft"),
      "modebar.activecolor": colour("--text"),
    };
  }

  function axis(own) {
    return { automargin: true, ...own, title: { font: { size: 12 }, standoff: 8, ...own.title } };
  }

  function layout(figure) {
    const own = figure.layout;
    return {
      ...own,
      height: figure.height,
      autosize: true,
      margin: { l: 8, r: 12, t: 26, b: 8 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12 },
      xaxis: axis(own.xaxis),
      yaxis: axis(own.yaxis),
      showlegend: figure.data.length > 1,
      legend: { orientation: "h", x: 0, y: 0, xref: "container", yref: "container", xanchor: "left", yanchor: "bottom" },
      hoverlabel: { namelength: -1 },
      modebar: { bgcolor: "rgba(0,0,0,0)" },
      dragmode: touch ? false : "zoom", // a finger that moves over a chart scrolls the page
    };
  }

  async function draw() {
    for (const figure of figures) {
      const place = document.getElementById(figure.id);
      await Plotly.newPlot(place, figure.data, layout(figure), settings);
      await Plotly.relayout(place, colours());
    }
    root.dataset.drawn = figures.length;
  }

  const recolour = () => Promise.all(plots().map((place) => Plotly.relayout(place, colours())));

  function isDark() {
    return root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
  }

  function switchTheme() {
    root.dataset.theme = isDark() ? "light" : "dark";
    recolour();
  }

  function switchRun(button) {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(shown));
    const run = Number(button.dataset.run);
    for (const place of plots()) {
      const traces = place.data.flatMap((trace, number) => (trace.meta && trace.meta.run === run ? [number] : []));
      if (traces.length) Plotly.restyle(place, { visible: shown ? true : "legendonly" }, traces);
    }
  }

  document.getElementById("theme").addEventListener("click", switchTheme);
  for (const button of document.querySelectorAll("button.toggle")) {
    button.addEventListener("click", () => switchRun(button));
  }
  dark.addEventListener("change", recolour);
  // On paper the page is light: charts take the colours that the style sheet has there.
  window.matchMedia("print").addEventListener("change", recolour);
  draw();
})();
