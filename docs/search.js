// From file:// a browser starts no worker, and fetches no JSON. This stands in for the worker of MkDocs there.
if (location.protocol === "file:") {
  window.Worker = function () {
    var worker = this, index, documents = {};
    function script(name, next) {
      var element = document.createElement("script");
      element.src = joinUrl(base_url, "search/" + name);
      element.onload = next;
      document.head.appendChild(element);
    }
    function answer(data) { worker.onmessage({ data: data }); }
    worker.postMessage = function (message) {
      if (message.query) {
        answer({
          results: index.search(message.query).map(function (found) {
            var page = documents[found.ref];
            return { location: page.location, title: page.title, summary: page.text.substring(0, 200) };
          })
        });
        return;
      }
      script("lunr.js", function () {
        script("search_index.js", function () {
          index = lunr(function () {
            this.field("title");
            this.field("text");
            this.ref("location");
            searchIndex.docs.forEach(function (page) { documents[page.location] = page; this.add(page); }, this);
          });
          answer({ config: searchIndex.config });
          answer({ allowSearch: true });
        });
      });
    };
  };
}
