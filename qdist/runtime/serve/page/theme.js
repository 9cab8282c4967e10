// Sets the chosen colours before anything is drawn.
(() => {
  "use strict";
  try {
    const theme = JSON.parse(localStorage.getItem("qdist.settings") || "{}").theme;
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch { /* a browser that keeps nothing, or a value of another page: the system's colours */ }
})();
